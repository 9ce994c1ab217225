"""What `bench kv --kernels` reports, with times that nobody measured; on a GPU also with some that were."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anybit.engine.bench import kv_kernels
from anybit.engine.bench.kv_kernels import KERNEL_FORMATS, SEALED_TOGETHER, KernelTimer, bench_kv_kernels, kernel_rows
from anybit.engine.bench.model_shapes import MODELS
from anybit.engine.config import ConfigError
from anybit.server.cli import app
from tests.fixtures.sentences import assert_one_sentence

CELLS = ((1, 128), (3, 200))
SECONDS = {"bf16": 4e-6, "qet4": 2e-6, "qet2": 1e-6}


class FakeTimer(KernelTimer):
    """Times that follow from what is asked for."""

    def __init__(self, library: dict[str, float]) -> None:
        super().__init__(MODELS["llama-3.1-8b"], torch.device("cpu"))
        self._library = library

    def pytorch_attention(self, batch: int, context: int) -> dict[str, float]:
        return self._library

    def exact_attention(self, batch: int, context: int) -> float:
        return SECONDS["bf16"] * batch

    def sealed_attention(self, kv_format: str, batch: int, context: int) -> float:
        return SECONDS[kv_format] * batch

    def sealing(self, kv_format: str, pages: int) -> float:
        return 1e-6 * (10 + pages)


class FullTimer(FakeTimer):
    def exact_attention(self, batch: int, context: int) -> float:
        raise torch.OutOfMemoryError


def test_a_cell_has_a_row_of_each_format_beside_the_library() -> None:
    rows = kernel_rows(FakeTimer({"flash": 6e-6, "cudnn": 3e-6}), CELLS, ("qet4", "qet2"))
    attention = [row for row in rows if row["kernel"] == "attention"]
    assert [(row["batch"], row["context"], row["kv_format"]) for row in attention] == [
        (*cell, name) for cell in CELLS for name in ("bf16", "qet4", "qet2")
    ]
    for row in attention:
        assert row["microseconds"] == pytest.approx(1e6 * SECONDS[row["kv_format"]] * row["batch"])
        assert row["library_microseconds"] == pytest.approx({"flash": 6, "cudnn": 3})
        assert row["times_library"] == pytest.approx(3 / row["microseconds"])
    json.dumps(rows, allow_nan=False)


def test_a_reading_that_is_off_does_not_count() -> None:
    class UnsteadyTimer(FakeTimer):
        readings = 0

        def sealed_attention(self, kv_format: str, batch: int, context: int) -> float:
            self.readings += 1
            return super().sealed_attention(kv_format, batch, context) * (9 if self.readings == 1 else 1)

    row = kernel_rows(UnsteadyTimer({}), CELLS[:1], ("qet4",))[1]
    assert row["microseconds"] == pytest.approx(1e6 * SECONDS["qet4"])


def test_sealing_is_told_by_the_page() -> None:
    rows = kernel_rows(FakeTimer({}), CELLS, ("qet4", "qet2"))
    sealing = [row for row in rows if row["kernel"] == "seal"]
    assert [(row["kv_format"], row["batch"]) for row in sealing] == [
        (name, pages) for name in ("qet4", "qet2") for pages in SEALED_TOGETHER
    ]
    for row in sealing:
        assert row["microseconds"] == pytest.approx((10 + row["batch"]) / row["batch"])
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert {row["times_library"] for row in rows} == {None}


def test_every_row_is_progress() -> None:
    seen: list[tuple[int, int]] = []
    rows = kernel_rows(FakeTimer({}), CELLS, ("qet4",), lambda *state: seen.append(state))
    assert seen == [(done, len(rows)) for done in range(len(rows) + 1)]


def test_a_cell_too_large_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="3x200") as caught:
        kernel_rows(FullTimer({}), CELLS[1:], ("qet4",))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("name", ["uniform4", "qet4/uniform4", "float32"])
def test_formats_without_a_kernel_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"not for {name}") as caught:
        bench_kv_kernels("llama-3.1-8b", CELLS, ("qet4", name))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_without_a_gpu_a_sentence_says_so(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["bench", "kv", "--shape", "llama-3.1-8b", "--kernels", "--device", device]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "PyTorch sees n" in str(result.exception)
    assert_one_sentence(result.exception)


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (("--kernels",), "needs a --shape"),
        (("--kernels", "model", "--shape", "llama-3.1-8b"), "not both"),
        (("--kernels", "--shape", "llama-3.1-8b", "--device", "cpu"), "those of a GPU"),
        (("--kernels", "--shape", "llama-3.1-8b", "--cells", "8x"), "not a list of cells"),
        (("--kernels", "--shape", "llama-3.1-8b", "--cells", "0x64"), "not a list of cells"),
        (("--kernels", "--shape", "llama-3.1-8b", "--cells", ""), "not a list of cells"),
        (("--shape", "llama-3.1-8b", "--json", "/nowhere/at/all.json"), "no directory"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], telling: str) -> None:
    result = CliRunner().invoke(app, ["bench", "kv", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert telling in result.output


def test_tables_and_json_tell_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def report(shape, cells, kv_formats, device, progress):
        rows = kernel_rows(FakeTimer({"cudnn": 3e-6}), cells, kv_formats, progress)
        return {"device": "a GPU", "versions": {}, "shape": shape, "rows": rows}

    monkeypatch.setattr(kv_kernels, "bench_kv_kernels", report)
    out = tmp_path / "kernels.json"
    arguments = ["bench", "kv", "--shape", "llama-3.1-8b", "--kernels", "--cells", "2x8192", "--kv-format", "qet4"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(out)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "0.75 x" in result.output
    assert "PyTorch's cudnn" in result.output
    assert "8,192" in result.output
    assert len(json.loads(out.read_text())["rows"]) == 2 + len(SEALED_TOGETHER)


@pytest.mark.gpu
def test_every_format_is_timed_on_a_gpu() -> None:
    report = bench_kv_kernels("llama-3.2-1b", CELLS)
    assert len(report["rows"]) == len(CELLS) * (1 + len(KERNEL_FORMATS)) + len(KERNEL_FORMATS) * len(SEALED_TOGETHER)
    for row in report["rows"]:
        assert row["microseconds"] > 0
    assert "flash" in report["rows"][0]["library_microseconds"]
