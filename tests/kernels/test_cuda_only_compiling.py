"""Products of several widths ask for their kernels where nothing is launched; no GPU is needed."""

import dataclasses
import threading

import pytest
import torch

from anybit.engine.compile_ahead import mixed_steps
from anybit.kernels.cuda import driver, fragments, linear, warpgroup_linear
from anybit.kernels.cuda.activations import prepare_activations
from anybit.kernels.cuda.driver import load_kernel, only_compiling
from anybit.kernels.cuda.warpgroup_tuning import Limits
from anybit.kernels.widths import RowWidths
from tests.fixtures.nested import random_nested
from tests.server.fake_engine import model_info


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled, as for an H100."""
    asked = set()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(linear, "has_warpgroups", lambda device: True)
    monkeypatch.setattr(warpgroup_linear, "limits", lambda: Limits(132, 227 << 10))
    monkeypatch.setattr(driver, "cached_cubin", lambda *of: asked.add((of[0], of[1], tuple(sorted(of[2].items())))))
    driver._compile.cache_clear()
    yield asked
    driver._compile.cache_clear()


def multiply(weight, widths, num_rows, is_fast):
    x = torch.empty(num_rows, weight.in_features, dtype=torch.bfloat16, device="meta")
    y = torch.empty(num_rows, weight.out_features, dtype=torch.bfloat16, device="meta")
    mixed = RowWidths(widths, torch.empty(num_rows, dtype=torch.int64, device="meta"))
    form = linear.mixed_form(num_rows, weight, mixed, is_fast)
    linear.multiply_mixed(prepare_activations(x, form), weight, mixed, None, y)


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_step_of_any_widths_and_rows_finds_its_kernels(compiled, is_fast):
    weight = fragments.pack(random_nested(4096, 512, 128))
    steps = mixed_steps(dataclasses.replace(model_info(), max_num_seqs=64))
    assert {widths for widths, _ in steps} >= {(2, 4), (2, 4, 8)}
    with only_compiling():
        for widths, num_rows in steps:
            multiply(weight, widths, num_rows, is_fast)
    assert {architecture for _, architecture, _ in compiled} == {"sm_90a"}
    ahead = set(compiled)
    with only_compiling():
        for widths in {widths for widths, _ in steps}:
            # Without --fast rows of a width begin at multiples of 4, so that two widths take 8 rows at least.
            for num_rows in range(2 if is_fast else 8, 65):
                multiply(weight, widths, num_rows, is_fast)
    assert set(compiled) == ahead


def test_other_threads_launch_meanwhile(compiled, monkeypatch):
    loaded = []
    monkeypatch.setattr(driver, "_load", lambda *of: loaded.append(of[1]))
    with only_compiling():
        kernel = load_kernel("greedy", "greedy_rows", ())
        kernel.launch((1, 1, 1), 32, [])  # nothing
        thread = threading.Thread(target=load_kernel, args=("norm", "norm_rows", ()))
        thread.start()
        thread.join()
    assert loaded == ["norm"]
    assert {name for name, *_ in compiled} == {"greedy"}
    load_kernel("greedy", "greedy_rows", ())
    assert loaded == ["norm", "greedy"]
