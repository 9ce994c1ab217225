"""Whole models under every calibrated method: checkpoints, resumption, seeds, bad input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anybit.engine.errors import SourceError
from anybit.engine.quantize import calibrated
from anybit.engine.quantize.options import METHODS, QuantizeOptions
from anybit.engine.quantize.run import quantize
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.selfcheck import check_checkpoint
from anybit.kernels import reference
from tests.fixtures.tiny_llama import save_llama, tiny_llama

WEIGHT = "model.layers.1.mlp.down_proj.weight"
GATE, GATE_NORM = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.post_attention_layernorm.weight"
CALIBRATED = [method for method in METHODS if method != "rtn"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(" ".join(f"Line {i} says {i * i % 97} things about {chr(97 + i % 26)}." for i in range(3000)))
    return path


def options(text: Path, **overrides) -> QuantizeOptions:
    small = {"calibration": (str(text),), "sequences": 12, "context": 32, "group_size": 32, "device": "cpu"}
    return QuantizeOptions(**{**small, **overrides})


def make(source: HuggingFaceSource, destination: Path, chosen: QuantizeOptions, progress=lambda *_: None):
    destination.mkdir(parents=True)
    return quantize(source, destination, chosen, progress)


def read(directory: Path, name: str, width: int) -> torch.Tensor:
    reader = CheckpointReader(directory)
    weight = reader.allocate([name], [width])
    reader.copy_nested(name, weight)
    return reference.dequantize(weight, width)


def relative_errors(directory: Path, source: HuggingFaceSource, widths: tuple[int, ...]) -> list[float]:
    """Of a linear together with the norm before it, between which a method may move scales."""
    wanted = source.tensor(GATE) * source.tensor(GATE_NORM)
    gains = CheckpointReader(directory).dense(GATE_NORM)
    errors = [(read(directory, GATE, width) * gains - wanted).square().mean() for width in widths]
    return [float(error / wanted.square().mean()) for error in errors]


@pytest.fixture(scope="module")
def source(tiny_source):
    return HuggingFaceSource(tiny_source)


@pytest.mark.parametrize("method", CALIBRATED)
def test_every_method_makes_a_checkpoint_that_comes_nearer_with_every_bit(method, source, text, tmp_path):
    manifest = make(source, tmp_path / "out", options(text, method=method))
    assert manifest.method == method
    assert manifest.method_options["calibration_tokens"] >= 12 * 32
    errors = relative_errors(tmp_path / "out", source, manifest.bit_widths)
    assert errors == sorted(errors, reverse=True)
    # GPTQ's one 8-bit grid for all widths pays for it at 8 bits.
    assert errors[-1] < (3e-2 if method == "gptq" else 1e-3)
    assert check_checkpoint(tmp_path / "out").bit_widths == manifest.bit_widths
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("width", [2, 3, 6, 8])
def test_a_single_width(method, width, source, text, tmp_path):
    chosen = options(text, method=method, bit_widths=(width,), stages=1)
    manifest = make(source, tmp_path / "out", chosen)
    assert manifest.bit_widths == (width,)
    (error,) = relative_errors(tmp_path / "out", source, (width,))
    assert error < 2.0 ** (-2 * width + 3.5)


@pytest.mark.parametrize(
    ("linear", "norm"), [("self_attn.v_proj", "input_layernorm"), ("mlp.up_proj", "post_attention_layernorm")]
)
def test_scaled_rows_take_their_biases_with_them(linear, norm, text, tmp_path):
    biased = HuggingFaceSource(save_llama(tiny_llama(attention_bias=True, mlp_bias=True), tmp_path / "source"))
    make(biased, tmp_path / "out", options(text, method="best", stages=1))
    prefix = "model.layers.1"
    reader = CheckpointReader(tmp_path / "out")
    column_scales = biased.tensor(f"{prefix}.{norm}.weight") / reader.dense(f"{prefix}.{norm}.weight")
    weight = biased.tensor(f"{prefix}.{linear}.weight") * column_scales
    row_scales = (weight / read(tmp_path / "out", f"{prefix}.{linear}.weight", 8)).median(1).values
    assert (row_scales - 1).abs().max() > 0.05
    assert torch.allclose(
        reader.dense(f"{prefix}.{linear}.bias") * row_scales, biased.tensor(f"{prefix}.{linear}.bias"), rtol=0.03
    )


def test_one_scale_for_a_whole_row(source, text, tmp_path):
    chosen = options(text, method="decoupleq", bit_widths=(2,), per_channel=True, stages=1)
    make(source, tmp_path / "out", chosen)
    reader = CheckpointReader(tmp_path / "out")
    weight = reader.allocate([WEIGHT], [2])
    reader.copy_nested(WEIGHT, weight)
    assert weight.num_groups == 3
    assert torch.equal(weight.affine[2].scale, weight.affine[2].scale[:1].expand(3, -1))


def test_true_sequential_solves_later_linears_for_what_earlier_ones_became(source, text, tmp_path):
    for flag in (False, True):
        make(source, tmp_path / str(flag), options(text, method="gptq", bit_widths=(2,), true_sequential=flag))
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(read(tmp_path / "False", first, 2), read(tmp_path / "True", first, 2))
    assert not torch.equal(read(tmp_path / "False", last, 2), read(tmp_path / "True", last, 2))


class StoppedError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_run_that_was_stopped_goes_on_and_gives_the_same_checkpoint(stop_at, source, text, tmp_path, monkeypatch):
    chosen = options(text, method="best")
    whole = make(source, tmp_path / "whole", chosen)

    def stop(done: int, total: int, what: str) -> None:
        if done >= stop_at and "written" not in what:
            raise StoppedError

    with pytest.raises(StoppedError):
        make(source, tmp_path / "stopped", chosen, stop)
    assert list(tmp_path.glob(".stopped.work-*/block-*.safetensors"))
    solved = []
    original = calibrated.BlockSolver.solve
    monkeypatch.setattr(
        calibrated.BlockSolver, "solve", lambda self, layer, *rest: solved.append(layer) or original(self, layer, *rest)
    )
    for leftover in (tmp_path / "stopped").iterdir():
        leftover.unlink()
    resumed = quantize(source, tmp_path / "stopped", chosen)
    assert solved == list(range(min(stop_at, 2), 2))
    assert resumed.files == whole.files
    assert not list(tmp_path.glob(".stopped.work-*"))


def test_the_seed_decides_what_is_seen(source, text, tmp_path):
    files = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        files[name] = make(source, tmp_path / name, options(text, method="gptq", bit_widths=(3,), seed=seed)).files
    assert files["a"] == files["b"]
    assert files["a"] != files["c"]


def test_work_of_other_options_is_not_gone_on_with(source, text, tmp_path):
    def stop(done: int, *_: object) -> None:
        if done >= 1:
            raise StoppedError

    chosen = options(text, method="best")
    for seed in (0, 1):
        with pytest.raises(StoppedError):
            quantize(source, _fresh(tmp_path / "out"), replace(chosen, seed=seed), stop)
        assert len(list(tmp_path.glob(".out.work-*"))) == 1


def _fresh(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    for path in directory.iterdir():
        path.unlink()
    return directory


def test_damaged_work_is_done_again(source, text, tmp_path):
    chosen = options(text, method="best")
    whole = make(source, tmp_path / "whole", chosen)

    def stop(done: int, *_: object) -> None:
        if done >= 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        make(source, tmp_path / "out", chosen, stop)
    (block,) = tmp_path.glob(".out.work-*/block-0001.safetensors")
    block.write_bytes(block.read_bytes()[:1000])
    assert quantize(source, _fresh(tmp_path / "out"), chosen).files == whole.files


def test_text_that_is_too_short_or_missing_is_told_in_a_sentence(source, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(SourceError, match=r"calibration text has \d+ tokens, fewer than one window of 32"):
        make(source, tmp_path / "a", options(short, method="gptq"))
    with pytest.raises(SourceError, match="cannot be read"):
        make(source, tmp_path / "b", options(tmp_path / "none.txt", method="gptq"))


def test_the_manifest_says_how_it_came_about(source, text, tmp_path):
    make(source, tmp_path / "out", options(text, method="best", seed=3))
    told = json.loads((tmp_path / "out" / "anybit.json").read_text())["method_options"]
    assert told["calibration"] == ["calibration.txt"]
    assert told["seed"] == 3
    assert set(told["damping"]) >= {"2", "3", "4"}
