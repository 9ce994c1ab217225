"""The HTML report: what it shows, that it loads and runs nothing, and that nothing a server says becomes markup."""

import asyncio
import re
from collections import Counter
from typing import Any
from xml.etree import ElementTree

import pytest

from anybit.server.bench.report import Goal
from anybit.server.bench.report_page.page import render_page
from anybit.server.bench.report_page.sections import sections
from anybit.server.bench.run import BenchSettings, bench_serve
from anybit.server.scoring.served_quality import served_quality
from tests.server.bench_reports import CLOSED, OPEN, sample_report
from tests.server.foreign_server import ForeignServer, Reply, answer, whole

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
