"""`anybit bench serve` from its command line, against a running `anybit serve`."""

import json
from pathlib import Path

from tests.endtoend.command import ServeCommand, free_port, run_anybit

LOAD = ("--requests", "5", "--concurrency", "2", "--prompt-tokens", "8", "--max-tokens", "6")


def test_report_has_a_row_per_width_and_the_server_counts_the_same(
    tiny_server: ServeCommand, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "serve.json"
    result = run_anybit(
        "bench", "serve", "--base-url", tiny_server.url, "--bit-width", "2,4,8", "--rounds", "2", *LOAD,
        "--slo-ttft-ms", "1e6", "--json", out, cache=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "TTFT p50" in result.stdout
    report = json.loads(out.read_text())
    keys = {"base_url", "model", "server", "machine", "versions", "settings", "rows"}
    assert keys | {"finished", "slo_met_up_to", "resources", "quality"} == report.keys()
    assert report["settings"]["concurrency"] == 2
    assert report["base_url"] == f"{tiny_server.url}/v1"
    assert [row["bit_width"] for row in report["rows"]] == [2, 4, 8]
    for row in report["rows"]:
        assert (row["requests"], row["completed"], row["failed"]) == (10, 10, {})
        assert (row["concurrency"], row["request_rate"]) == (2, None)
        assert row["generated_tokens"] == 60
        assert row["goodput_requests_per_second"] == row["requests_per_second"]
        for name in ("ttft_ms", "itl_ms", "tpot_ms", "latency_ms"):
            assert 0 <= row[name]["p50"] <= row[name]["p99"] <= row[name]["max"]
    prompt_tokens = {row["prompt_tokens"] for row in report["rows"]}
    assert len(prompt_tokens) == 1  # the same prompts at every width
    # Ten counted requests and one to warm up.
    assert tiny_server.metric("anybit_requests_total", bit_width="8", outcome="length") == 11


def test_all_means_the_widths_of_the_server(tiny_server: ServeCommand, cache: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "serve.json", tmp_path / "prompts.txt"
    prompts.write_text("Hello world\nHow are you today?\n")
    result = run_anybit(
        "bench", "serve", "--base-url", f"{tiny_server.url}/v1/", "--bit-width", "all", "--endpoint", "chat",
        "--prompts", prompts, "--request-rate", "200", "--requests", "3", "--max-tokens", "3", "--json", out,
        cache=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["bit_width"], row["generated_tokens"]) for row in rows] == [(w, 9) for w in (2, 3, 4, 6, 8)]
    assert {(row["concurrency"], row["request_rate"]) for row in rows} == {(None, 200)}


def test_without_a_width_the_row_says_the_default(tiny_server: ServeCommand, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    result = run_anybit("bench", "serve", "--base-url", tiny_server.url, *LOAD, "--json", out, cache=cache)
    assert result.returncode == 0, result.stderr
    assert [row["bit_width"] for row in json.loads(out.read_text())["rows"]] == [4]


def test_unanswered_requests_are_one_sentence(tiny_server: ServeCommand, cache: Path) -> None:
    result = run_anybit("bench", "serve", "--base-url", tiny_server.url, "--prompt-tokens", "5000", cache=cache)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("anybit: ")]
    assert "None of 32 requests was answered: Status 400" in line


def test_unreachable_server_is_one_sentence(cache: Path) -> None:
    result = run_anybit("bench", "serve", "--base-url", f"http://127.0.0.1:{free_port()}", cache=cache)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "cannot be reached" in result.stderr
