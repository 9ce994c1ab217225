"""The HTML report: what it shows, that it loads and runs nothing, and that nothing a server says becomes markup."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from anybit.server.bench.report import Goal
from anybit.server.bench.report_page.page import render_page
from anybit.server.bench.report_page.sections import sections
from anybit.server.bench.run import BenchSettings, bench_serve
from anybit.server.cli import app
from anybit.server.commands.bench_serve import OutputError
from anybit.server.scoring.served_quality import served_quality
from tests.fixtures.sentences import assert_one_sentence
from tests.server.bench_reports import CLOSED, OPEN, TEXT, sample_report
from tests.server.fake_engine import FakeEngine
from tests.server.foreign_server import ForeignServer, Reply, answer, whole
from tests.server.live_server import LiveServer

VOID = r"<(meta|link)([^>]*[^/])>"
HOSTILE = "</title><script>alert(1)</script>\"' onload=x &amp; [bold]"


def parsed(page: str) -> ElementTree.Element:
    """The page as XML, which it is but for its void elements: a tag that does not match is an error."""
    return ElementTree.fromstring(re.sub(VOID, r"<\1\2/>", page.removeprefix("<!DOCTYPE html>\n")))


def text_of(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def figures(page: ElementTree.Element) -> dict[str, ElementTree.Element]:
    return {figure.findtext("figcaption") or "": figure for figure in page.iter("figure")}


def test_every_plot_is_there_with_its_words_and_numbers() -> None:
    page = parsed(render_page(sample_report()))
    found = figures(page)
    assert set(found) == {
        "Time to first token, median (ms)",
        "Time to first token, p99 (ms)",
        "Time per further token, median (ms)",
        "Time per further token, p99 (ms)",
        "Tokens per second, all requests together",
        "Answers per second",
        "Requests per second that met the SLO",
        "Share of requests that met the SLO",
        "Weights in memory: models of one width each, and this server with all",
        "Weights read for a token of one request",
        "Keys and values of one token, by KV format",
        "Memory that the engine holds of its device",
        "Perplexity against weights read per token",
        "What a bit is worth: perplexity against speed",
        "Live quality: KL divergence from the highest width, nats per token",
    }
    for title, figure in found.items():
        (svg,), (table,) = figure.iter("svg"), figure.iter("table")
        named = (svg.attrib["aria-labelledby"]).split()
        assert [
            element.attrib["id"] for element in (svg.find("title"), svg.find("desc")) if element is not None
        ] == named
        assert svg.attrib["role"] == "img"
        assert svg.findtext("title") == title
        assert len(svg.findtext("desc") or "") > 10
        assert len(table.findall("tbody/tr")) >= 1


def test_numbers_of_a_plot_are_a_table_of_loads_and_widths() -> None:
    figure = figures(parsed(render_page(sample_report())))["Time to first token, median (ms)"]
    rows = [[cell.text for cell in row] for row in figure.iter("tr")]
    assert rows[0] == ["requests in flight", "2 bits", "4 bits", "8 bits"]
    assert [row[0] for row in rows[1:]] == ["1", "4", "16"]
    assert rows[1][1:] == ["43.5", "87.0", "174"]  # 30, 60 and 120 ms by 1 to 1.9 times, in the middle
    assert "2 bits, 4 at a time: 87.0" in text_of(figure)


@pytest.mark.parametrize("loads", [CLOSED, OPEN, CLOSED[:1], OPEN[2:]])
def test_page_is_whole_whatever_the_loads(loads: Any) -> None:
    page = render_page(sample_report(loads))
    root = parsed(page)
    ids = Counter(element.attrib["id"] for element in root.iter() if "id" in element.attrib)
    assert set(ids.values()) == {1}
    assert not re.search(r"\b(nan|None)\b", page)
    one_load = "One load was measured" in text_of(root)
    assert one_load == (len(loads) == 1)
    assert len(page.encode()) < 100_000


def test_page_loads_and_runs_nothing() -> None:
    page = render_page(sample_report())
    assert "<script" not in page
    assert not re.search(r"""\bon\w+\s*=\s*["']""", page)
    assert re.findall(r'(?:src|href|srcset|action|data)="([^"]*)"', page) == ["data:,"]
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_nothing_that_a_server_says_becomes_markup() -> None:
    report = sample_report(CLOSED, model=HOSTILE, base_url=HOSTILE)
    report["server"] = dict.fromkeys(report["server"], HOSTILE)
    report["rows"][0] |= {"messages": {"5xx": HOSTILE}, "failed": {"5xx": 1}}
    report["resources"]["kv_formats"][0]["kv_format"] = HOSTILE
    report["resources"]["device_memory_bytes"] = {HOSTILE: 7}
    report["quality"] |= {"note": HOSTILE}
    page = render_page(report)
    root = parsed(page)
    assert not list(root.iter("script"))
    assert root.findtext("head/title") == f"{HOSTILE} under load"
    assert text_of(root).count("alert(1)") >= 7
    assert "<script" not in page


def test_what_failed_leaves_a_gap_and_a_note() -> None:
    report = sample_report(failing=(1,))
    root = parsed(render_page(report))
    figure = figures(root)["Time to first token, median (ms)"]
    assert [cell.text for cell in list(figure.iter("tr"))[2]] == ["4", "–", "174", "348"]
    assert "not measured" in (figure.findtext("svg/desc") or "")
    assert "2 bits, 4 at a time: 10 failed (5xx): broken" in text_of(root)
    lines = [element for element in figure.iter("path") if element.attrib.get("class", "").startswith("line ")]
    assert len(lines) == 2  # the broken line has no two neighbours left


def test_a_width_that_never_answered_has_no_times() -> None:
    root = parsed(render_page(sample_report(failing=(0, 1, 2))))
    labels = [text.text for text in figures(root)["Time to first token, p99 (ms)"].iter("text")]
    assert "2 bits" not in labels
    assert "4 bits" in labels


def test_goal_is_drawn_and_said() -> None:
    root = parsed(render_page(sample_report(goal=Goal(100.0, 20.0, 0.6))))
    text = text_of(root)
    assert "the first token within 100 ms and each further token, on average, within 20 ms" in text
    assert "met by 60 % up to" in text
    assert "SLO 100 ms" in text_of(figures(root)["Time to first token, median (ms)"])
    section = next(part for part in root.iter("section") if part.findtext("h2") == "Goodput")
    rows = [[cell.text for cell in row] for row in next(section.iter("table")).iter("tr")]
    assert rows[1:] == [["2 bits", "4 at a time"], ["4 bits", "1 at a time"], ["8 bits", "none"]]


def test_a_goal_far_above_does_not_press_the_lines_to_the_ground() -> None:
    root = parsed(render_page(sample_report(goal=Goal(1e6))))
    figure = figures(root)["Time to first token, median (ms)"]
    assert not [element for element in figure.iter("path") if element.attrib.get("class") == "limit"]
    assert "16 at a time (the highest measured)" in text_of(root)


@pytest.mark.parametrize(
    ("changes", "telling"),
    [
        ({"goal": Goal()}, "--slo-ttft-ms 200 --slo-tpot-ms 50"),
        ({"resources": None}, "has no series of AnyBit's"),
        ({"quality": None}, "--quality-tokens 2048"),
        ({"quality": {"results": [], "note": "It cannot score."}}, "Perplexity was not measured: It cannot score."),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(changes: dict[str, Any], telling: str) -> None:
    assert telling in text_of(parsed(render_page(sample_report(**changes))))


def test_server_of_another_make_gets_its_one_line() -> None:
    report = sample_report(widths=(None,), resources=None, server=None, quality=None)
    root = parsed(render_page(report))
    assert "default" in text_of(figures(root)["Answers per second"])
    assert not any("Perplexity" in title for title in figures(root))
    assert [section.title for section in sections(report)][:2] == ["At a glance", "Latency and throughput"]


def test_another_server_has_a_report_that_says_what_it_does_not_offer() -> None:
    async def no_scores(body: dict[str, Any]) -> Reply:
        async for piece in answer(body) if body.get("stream") else _not_found():
            yield piece

    async def measure() -> dict[str, Any]:
        async with ForeignServer(no_scores) as server:
            url = f"{server.url}/v1"
            report = await bench_serve(url, None, None, BenchSettings(requests=3, max_tokens=4))
            return report | {"quality": await served_quality(url, None, report["model"], "", 64)}

    report = asyncio.run(measure())
    text = text_of(parsed(render_page(report)))
    assert "their-model under load" in text
    assert "has no series of AnyBit's" in text
    assert "Perplexity was not measured: http://127.0.0.1" in text
    assert "answered 404: no such route." in text


async def _not_found() -> Reply:
    yield whole(404, {"error": {"message": "no such route"}})


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


def run(server: LiveServer, *arguments: str | Path) -> Any:
    fixed = ("--bit-width", "2,8", "--requests", "3", "--prompt-tokens", "8", "--max-tokens", "4")
    command = ["bench", "serve", "--base-url", server.url, *fixed, *map(str, arguments)]
    return CliRunner().invoke(app, command, env={"COLUMNS": "200"})


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
