"""What `anybit bench kv` says of a shape, for which nothing is measured."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anybit.engine.bench.kv import capacity_of_shape
from anybit.engine.bench.model_shapes import MODELS
from anybit.server.cli import app


def test_tokens_of_a_gib_fill_it_with_whole_sequences() -> None:
    config = MODELS["llama-3.1-8b"]
    exact, qet4 = capacity_of_shape("llama-3.1-8b", ("qet4",))["rows"]
    assert exact["tokens_per_gib"]["8192"] == 2**30 // (
        2 * 2 * config.head_dim * config.num_kv_heads * config.num_layers
    )
    for length, share in qet4["capacity"].items():
        assert qet4["tokens_per_gib"][length] == pytest.approx(share * exact["tokens_per_gib"][length], rel=1e-3)


def test_a_shape_needs_no_model(tmp_path: Path) -> None:
    out = tmp_path / "capacity.json"
    arguments = ["bench", "kv", "--shape", "llama-3.1-8b", "--kv-format", "qet4,qet2", "--json", str(out)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "30,496 (3.72 x)" in result.output
    assert [row["kv_format"] for row in json.loads(out.read_text())["rows"]] == ["bf16", "qet4", "qet2"]


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [(("--shape", "llama-2-70b"), "is not one of"), (("model", "--shape", "llama-3.1-8b"), "not both")],
)
def test_wrong_shapes_are_wrong_usage(arguments: tuple[str, ...], telling: str) -> None:
    result = CliRunner().invoke(app, ["bench", "kv", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert telling in result.output
