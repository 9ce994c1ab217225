"""`anybit bench serve` as a command: what it prints, writes, scores, and refuses before it sends anything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from anybit.server.bench.report_page.page import render_page
from anybit.server.cli import app
from anybit.server.commands.bench_serve import OutputError
from tests.fixtures.sentences import assert_one_sentence
from tests.server.bench_reports import TEXT
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import LiveServer


def run(server: LiveServer, *arguments: str | Path) -> Any:
    fixed = ("--bit-width", "2,8", "--requests", "3", "--prompt-tokens", "8", "--max-tokens", "4")
    command = ["bench", "serve", "--base-url", server.url, *fixed, *map(str, arguments)]
    return CliRunner().invoke(app, command, env={"COLUMNS": "200"})


def test_fewer_requests_than_the_load_wants_are_noted(server: LiveServer, tmp_path: Path) -> None:
    result = run(server, "--html", tmp_path / "report.html", "--quality-tokens", "0")
    assert "A round has 3 requests, so no more than that were in flight" in result.output
    assert "--requests 8 is the least" in (tmp_path / "report.html").read_text()


def test_the_servers_own_width_is_the_one_that_is_scored(server: LiveServer, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = run(server, "--bit-width", "", "--quality-tokens", "64", "--json", out)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert [row["bit_width"] for row in report["rows"]] == [4]
    assert [(row["bit_width"], row["effective_bits"]) for row in report["quality"]["results"]] == [(4, 4.25)]


def test_command_writes_both_files_and_scores_the_widths(server: LiveServer, tmp_path: Path) -> None:
    html, out = tmp_path / "report.html", tmp_path / "report.json"
    sweep = ("--concurrency", "3,1", "--slo-ttft-ms", "1e6", "--quality-tokens", "64")
    result = run(server, *sweep, "--html", html, "--json", out)
    assert result.exit_code == 0, result.output
    assert "in flight" in result.output
    assert f"tiny on {TEXT}" in result.output
    report = json.loads(out.read_text())
    assert [(row["bit_width"], row["concurrency"]) for row in report["rows"]] == [(2, 1), (2, 3), (8, 1), (8, 3)]
    assert report["slo_met_up_to"][1] == {"bit_width": 8, "concurrency": 3, "request_rate": None}
    assert [row["bit_width"] for row in report["quality"]["results"]] == [2, 8]
    assert (report["quality"]["tokens"], report["quality"]["note"]) == (63, None)
    assert html.read_text() == render_page(report)  # whoever has the JSON can draw it again


def test_without_a_report_nothing_is_scored(start: Callable[..., LiveServer], tmp_path: Path) -> None:
    engine = FakeEngine()
    out = tmp_path / "report.json"
    assert run(start(engine), "--json", out).exit_code == 0
    assert json.loads(out.read_text())["quality"] is None
    assert all(request.sampling.max_tokens == 4 for request in engine.requests)


@pytest.mark.parametrize(("tokens", "telling"), [("0", "--quality-tokens 2048"), ("64", "Perplexity on 63 tokens")])
def test_scoring_can_be_turned_off_and_set(server: LiveServer, tmp_path: Path, tokens: str, telling: str) -> None:
    html = tmp_path / "report.html"
    assert run(server, "--html", html, "--quality-tokens", tokens).exit_code == 0
    assert telling in html.read_text()


def test_numbers_are_printed_when_the_report_cannot_be_written(server: LiveServer, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = run(server, "--html", "/dev/full", "--json", out, "--quality-tokens", "0")
    assert isinstance(result.exception, OutputError)
    assert_one_sentence(result.exception, "/dev/full cannot be written: No space left on device.")
    assert "TTFT p50" in result.output
    assert len(json.loads(out.read_text())["rows"]) == 2


@pytest.mark.parametrize("name", ["missing/report.html", "."])
def test_a_place_for_no_file_is_refused_before_anything_is_sent(
    start: Callable[..., LiveServer], tmp_path: Path, name: str
) -> None:
    engine = FakeEngine()
    result = run(start(engine), "--html", tmp_path / name)
    assert result.exit_code == 2
    assert "for --html" in result.output
    assert engine.requests == []


def test_a_refused_run_leaves_no_empty_file(server: LiveServer, tmp_path: Path) -> None:
    html, old = tmp_path / "report.html", tmp_path / "old.json"
    old.write_text("kept")
    assert run(server, "--html", html, "--json", old, "--bit-width", "6").exit_code == 1
    assert not html.exists()
    assert old.read_text() == "kept"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--base-url", "127.0.0.1:8000"),
        ("--bit-width", "5"),
        ("--endpoint", "embeddings"),
        ("--concurrency", "2", "--request-rate", "1"),
        ("--request-rate", "0"),
        ("--request-rate", "nan"),
        ("--request-rate", "1,-2"),
        ("--request-rate", "1,fast"),
        ("--concurrency", "0"),
        ("--concurrency", "1,,4"),
        ("--concurrency", "1.5"),
        ("--concurrency", ""),
        ("--concurrency", "4,64", "--requests", "32"),
        ("--slo-share", "0"),
        ("--slo-share", "nan"),
        ("--quality-tokens", "-1"),
        ("--quality-tokens", "3"),
        ("--shared-prefix-tokens", "300"),
        ("--prompts", "/nowhere/prompts.txt"),
        ("--json", "/nowhere/report.json"),
        ("--html", "/nowhere/report.html"),
        ("--html", "/"),
        ("--html", "/proc/report.html"),
        ("--html", "report", "--json", "./report"),
        ("--timeout", "inf"),
        ("--api-key", "schlüssel"),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["bench", "serve", *arguments])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
