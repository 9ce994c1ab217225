"""The command line as a user meets it: quick help, one sentence for what is wrong, JSON where there is a table."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anybit.server.cli import app
from tests.endtoend.command import environment, run_anybit

WIDTHS = [2, 3, 4, 6, 8]


def sentence(stderr: str) -> str:
    """The one line of standard error that is left once progress bars are set aside."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("anybit: ")]
    assert len(lines) == 1, stderr
    assert lines[0].endswith(".")
    return lines[0]


def test_help_loads_neither_torch_nor_a_web_framework(cache: Path) -> None:
    program = (
        "import sys; from anybit.server.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'fastapi', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(cache), capture_output=True, text=True, check=True
    )
    assert "serve" in result.stdout
    assert result.stderr.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--widths", "5"),
        ("serve", "--group-size", "7"),
        ("nonsense",),
        ("quantize",),
        ("eval", "--context", "1"),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...], cache: Path) -> None:
    result = run_anybit(*arguments, cache=cache)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (("serve", "/nowhere/model"), "no model at /nowhere/model"),
        (("serve", "--default-bit-width", "8", "--widths", "2,3,4"), "not among the served widths"),
        (("serve", "--device", "abacus"), "abacus"),
        (("serve", "--allowed-origin", "chat.example.com"), "is no origin of web pages"),
        (("quantize", "/nowhere/model", "/tmp/unused-destination"), "/nowhere/model"),
    ],
)
def test_wrong_setting_is_one_sentence(arguments: tuple[str, ...], telling: str, cache: Path) -> None:
    result = run_anybit(*arguments, cache=cache)
    assert result.returncode == 1
    assert telling in sentence(result.stderr)


def test_serve_flipped_byte_is_one_sentence(tiny_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    shard = next(damaged.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = run_anybit("serve", damaged, "--port", "0", cache=cache)
    assert result.returncode == 1
    assert "SHA-256" in sentence(result.stderr)


def test_serve_taken_port_is_one_sentence(tiny_checkpoint: Path, cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run_anybit("serve", tiny_checkpoint, "--port", str(taken.getsockname()[1]), cache=cache)
    assert result.returncode == 1
    assert "--port" in sentence(result.stderr)


def test_serve_pickle_checkpoint_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for model in (tmp_path, tmp_path / "pytorch_model.bin"):
        result = run_anybit("serve", model, cache=cache)
        assert result.returncode == 1
        assert "pickle" in sentence(result.stderr)


def test_failed_quantization_leaves_nothing(tiny_source: Path, cache: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_source, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    destination = tmp_path / "out" / "checkpoint"
    result = run_anybit("quantize", broken, destination, cache=cache)
    assert result.returncode == 1
    sentence(result.stderr)
    assert not destination.exists()
    assert not [path for path in destination.parent.glob("*") if not path.name.startswith(".")]
    assert not list(destination.parent.glob(".*partial*"))


def test_serve_quantizes_a_directory_once(tiny_source: Path, cache: Path) -> None:
    first = run_anybit("inspect", tiny_source, cache=cache)
    assert first.returncode == 0, first.stderr
    assert "Quantizing" in first.stderr
    again = run_anybit("inspect", tiny_source, cache=cache)
    assert again.returncode == 0, again.stderr
    assert "Quantizing" not in again.stderr


def test_inspect_json_counts_bits(tiny_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "inspect.json"
    assert run_anybit("inspect", tiny_checkpoint, "--json", out, cache=cache).returncode == 0
    report = json.loads(out.read_text())
    assert [row["bit_width"] for row in report["widths"]] == WIDTHS
    # One group size per weight: 64 inputs in groups of 64, 128 in groups of 128.
    first = report["widths"][0]
    assert 2 + 32 / 128 < first["effective_bits"] < 2 + 32 / 64


def test_quantize_balances_keys_on_a_text_and_inspect_says_so(tiny_source: Path, cache: Path, tmp_path: Path) -> None:
    destination, out = tmp_path / "balanced", tmp_path / "inspect.json"
    made = run_anybit(
        "quantize", tiny_source, destination, "--method", "rtn", "--kv-calibration", "shipped", cache=cache
    )
    assert made.returncode == 0, made.stderr
    shown = run_anybit("inspect", destination, "--json", out, cache=cache)
    assert "keys balanced on 8192 tokens of shipped" in shown.stdout
    assert list(json.loads(out.read_text())["key_balance"]["texts"]) == ["shipped"]


def test_eval_json_has_every_width_and_the_float_model(tiny_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "eval.json", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. Hello world, how are you today? " * 20)
    result = run_anybit(
        "eval", tiny_checkpoint, "--text", text, "--context", "64", "--max-tokens", "256", "--json", out,
        "--baseline", "matquant-slice", cache=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert report["tokens"] == 4 * 63
    nested = {row["bit_width"]: row for row in report["results"] if row["scheme"] != "matquant-slice"}
    assert list(nested) == ["float", *WIDTHS]
    assert len(report["results"]) == 1 + 2 * len(WIDTHS)
    assert nested["float"]["kl"] == 0
    kl = [nested[width]["kl"] for width in WIDTHS]
    assert kl == sorted(kl, reverse=True)


def test_eval_unreadable_text_is_one_sentence(tiny_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    text = tmp_path / "latin1.txt"
    text.write_bytes(b"caf\xe9 " * 1000)
    result = run_anybit("eval", tiny_checkpoint, "--text", text, cache=cache)
    assert result.returncode == 1
    assert "UTF-8" in sentence(result.stderr)


def test_bench_decode_json_has_the_contracted_shape(tiny_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    result = run_anybit(
        "bench", "decode", tiny_checkpoint, "--bit-width", "2,8", "--batch", "1,3", "--context", "16", "--steps", "2",
        "--rounds", "1", "--json", out, cache=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert [(row["bit_width"], row["batch"]) for row in report["rows"]] == [(2, 1), (2, 3), (8, 1), (8, 3)]
    keys = {"bit_width", "kv_format", "batch", "context", "tokens_per_second", "step_milliseconds", "floor_share"}
    assert keys <= report["rows"][0].keys()


def test_bench_decode_measures_every_kv_format(tiny_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    result = run_anybit(
        "bench", "decode", tiny_checkpoint, "--bit-width", "4", "--batch", "1", "--context", "70", "--steps", "2",
        "--rounds", "1", "--kv-format", "bf16,qet4", "--json", out, cache=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [row["kv_format"] for row in json.loads(out.read_text())["rows"]] == ["bf16", "qet4"]


def test_bench_offline_json_has_the_rows_of_bench_serve(tiny_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "offline.json"
    result = run_anybit(
        "bench", "offline", tiny_checkpoint, "--bit-width", "2,8", "--concurrency", "2", "--requests", "3",
        "--prompt-tokens", "8", "--max-tokens", "4", "--threads", "1", "--json", out, cache=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "without HTTP" in result.stdout
    report = json.loads(out.read_text())
    assert {"model", "device", "versions", "settings", "rows"} <= report.keys()
    assert report["settings"]["concurrency"] == 2
    assert [(row["bit_width"], row["completed"], row["generated_tokens"]) for row in report["rows"]] == [
        (2, 3, 12),
        (8, 3, 12),
    ]
    assert {"seconds", "tokens_per_second", "requests_per_second", "ttft_ms"} <= report["rows"][0].keys()


def test_bench_kv_compares_formats_with_bf16(tiny_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "kv.json"
    result = run_anybit(
        "bench", "kv", tiny_checkpoint, "--kv-format", "qet4,uniform8", "--context", "256", "--max-tokens", "512",
        "--json", out, cache=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = {row["kv_format"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["bf16", "qet4", "uniform8"]
    assert (rows["bf16"]["kl"], rows["bf16"]["top1_agreement"], rows["bf16"]["key_bits"]) == (0, 1, 16)
    assert rows["qet4"]["kl"] > rows["uniform8"]["kl"] > 0
    assert 4 < rows["qet4"]["value_bits"] < rows["qet4"]["key_bits"] < 5.5
    assert rows["qet4"]["capacity"]["8192"] > 2.5


@pytest.mark.parametrize("command", [("bench", "kv"), ("bench", "decode"), ("eval",)])
def test_unknown_kv_formats_are_wrong_usage(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*command, "--kv-format", "bf16,int4"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "'int4' is not one of" in result.output


def test_bench_kernels_json_has_the_contracted_shape(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    result = run_anybit(
        "bench", "kernels", "--device", "cpu", "--shape", "64x64", "--bit-width", "2,8", "--batch", "1,3",
        "--rotation-mib", "1", "--rounds", "1", "--threads", "1", "--json", out, cache=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "read bandwidth" in result.stdout
    report = json.loads(out.read_text())
    assert [(row["bit_width"], row["m"]) for row in report["rows"]] == [(2, 1), (2, 3), (8, 1), (8, 3)]
    assert {"device", "versions", "copy_gb_per_second", "read_gb_per_second"} <= report.keys()
    keys = {"op", "out", "in", "m", "bit_width", "group_size", "peer", "microseconds", "bytes", "floor_share"}
    assert keys <= report["rows"][0].keys()


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (("--shape", "llama-2-70b"), "not a shape"),
        (("--shape", "64x33"), "not a multiple of 32"),
        (("--shape", "64x96", "--group-size", "64"), "not a multiple of --group-size 64"),
        (("--bit-width", "5"), "not a list of bit-widths"),
        (("--batch", "0"), "not a list of numbers"),
        (("--device", "tpu"), "not auto, cpu or cuda"),
        (("--json", "/nowhere/report.json"), "no directory"),
    ],
)
def test_bench_kernels_wrong_usage_is_told_before_anything_runs(arguments: tuple[str, ...], telling: str) -> None:
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert telling in result.output
    assert "Traceback" not in result.output


def test_chat_switches_width_in_the_middle(tiny_checkpoint: Path, cache: Path) -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("anybit")), "chat", str(tiny_checkpoint), "--max-tokens", "4"],
        env=environment(cache),
        input="Hello\n/width 3\nHello again\n/width 5\n/quit\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "8 bits>" in result.stdout
    assert "3 bits>" in result.stdout
    assert result.stdout.count("Commands:") == 2  # once at the start, once for the width that is not there
