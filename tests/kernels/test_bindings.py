"""The compiled kernels where there are none, and how one asks for others."""

import logging
import shutil

import pytest
import torch

from anybit.kernels import dispatch, reference
from anybit.kernels.cpu import bindings
from anybit.kernels.nested import NestedWeight
from tests.fixtures.native import native_only
from tests.fixtures.nested import normal, random_nested


def test_they_are_built_wherever_there_is_a_compiler():
    """Tests of the native kernels are skipped without them, so their absence must not go unnoticed."""
    assert bindings.is_native() or shutil.which("c++") is None


@pytest.fixture
def fresh_library(monkeypatch):
    """`bindings.native_library` as in a new process."""
    monkeypatch.delenv(bindings.VARIABLE, raising=False)
    bindings.native_library.cache_clear()
    yield bindings
    monkeypatch.undo()
    bindings.native_library.cache_clear()
    bindings.native_library()


def test_without_a_compiler_linears_are_portable_and_one_sentence_says_how_to_mend_it(
    fresh_library, monkeypatch, caplog
):
    monkeypatch.setattr(bindings, "MODULE_NAME", "anybit.kernels.cpu._was_never_built")
    weight, x = random_nested(24, 64, 32), normal(3, 64)
    with caplog.at_level(logging.WARNING, logger="anybit.kernels"):
        served = [dispatch.prepare(weight) for _ in range(3)]
    assert all(isinstance(prepared, NestedWeight) for prepared in served)
    assert torch.allclose(dispatch.linear(x, served[0], [(4, 0, 3)]), reference.linear(x, weight, 4), atol=1e-2)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "slower" in message
    assert "install a C++ compiler" in message


def test_none_leaves_them_unused_without_a_word(fresh_library, monkeypatch, caplog):
    monkeypatch.setenv(bindings.VARIABLE, "none")
    assert not fresh_library.is_native()
    assert fresh_library.instruction_sets() == []
    assert not caplog.records


@native_only
def test_name_of_an_instruction_set_takes_that_one(fresh_library, monkeypatch):
    best, *others = bindings.instruction_sets()
    for name in (*others, best):
        monkeypatch.setenv(bindings.VARIABLE, name)
        bindings.native_library.cache_clear()
        assert bindings.selected_instruction_set() == name


@native_only
def test_unknown_name_takes_the_best_and_says_so(fresh_library, monkeypatch, caplog):
    best = bindings.instruction_sets()[0]
    bindings.select_instruction_set(best)
    monkeypatch.setenv(bindings.VARIABLE, "abacus")
    bindings.native_library.cache_clear()
    assert bindings.selected_instruction_set() == best
    assert "'abacus'" in caplog.text
