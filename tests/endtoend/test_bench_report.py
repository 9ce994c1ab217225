"""The HTML report of `anybit bench serve` on a running `anybit serve`, opened in a real browser."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.endtoend.command import ServeCommand, run_anybit
from tests.fixtures.browser import open_browser, set_view


@dataclass(frozen=True)
class Written:
    html: Path
    report: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def written(tiny_server: ServeCommand, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A sweep of two widths over three loads."""
    folder = tmp_path_factory.mktemp("report")
    html, out = folder / "report.html", folder / "report.json"
    result = run_anybit(
        "bench", "serve", "--base-url", tiny_server.url, "--bit-width", "2,8", "--concurrency", "1,2,4",
        "--requests", "4", "--prompt-tokens", "8", "--max-tokens", "6", "--slo-ttft-ms", "1e6", "--quality-tokens", "256",
        "--html", html, "--json", out, cache=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return Written(html, json.loads(out.read_text()), result.stdout)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


def test_each_width_is_measured_at_each_load(written: Written, tiny_server: ServeCommand) -> None:
    rows = written.report["rows"]
    assert [(row["bit_width"], row["concurrency"]) for row in rows] == [(w, n) for w in (2, 8) for n in (1, 2, 4)]
    for row in rows:
        assert (row["requests"], row["completed"], row["generated_tokens"]) == (4, 4, 24)
        assert row["goodput_share"] == 1
        assert row["request_rate"] is None
    assert {row["concurrency"] for row in written.report["slo_met_up_to"]} == {4}
    assert "in flight" in written.printed
    # Three loads of four requests, one to warm up, and what was scored.
    assert tiny_server.metric("anybit_requests_total", bit_width="8", outcome="length") >= 13


def test_costs_and_quality_are_those_of_the_server(written: Written, tiny_server: ServeCommand) -> None:
    resources, quality = written.report["resources"], written.report["quality"]
    assert sum(resources["weights_bytes"].values()) == tiny_server.metric("anybit_weights_bytes")
    narrow, *_, wide = resources["widths"]
    assert (narrow["bit_width"], wide["bit_width"]) == (2, 8)
    assert 0 < narrow["bytes_read_per_token"] < wide["bytes_read_per_token"]
    assert 0 < narrow["equivalent_bytes"] < wide["equivalent_bytes"]
    assert quality["note"] is None
    assert quality["tokens"] >= 200
    assert [row["bit_width"] for row in quality["results"]] == [2, 8]
    assert all(row["perplexity"] > 1 for row in quality["results"])
    assert "perplexity" in written.printed


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_page_opens_without_errors_and_asks_for_nothing(
    browser: Chrome, written: Written, width: int, height: int, dark: bool
) -> None:
    set_view(browser, width, height, dark=dark, phone=width < 600)
    browser.get_log("browser")
    browser.get(written.html.as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    assert len(browser.find_elements(By.TAG_NAME, "figure")) >= 12
    for svg in browser.find_elements(By.TAG_NAME, "svg"):
        assert svg.size["width"] > 250
        assert svg.size["height"] > 40
    wider = "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not browser.execute_script(wider), "the page scrolls sideways"
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


@pytest.mark.parametrize("width", [1280, 390])
def test_no_text_of_a_plot_leaves_its_drawing_or_covers_another(browser: Chrome, written: Written, width: int) -> None:
    set_view(browser, width, 900, phone=width < 600)
    browser.get(written.html.as_uri())
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map((svg) => [svg, ...svg.querySelectorAll('text')].map((part) => {"
        "const box = part.getBoundingClientRect();"
        "return {text: part === svg ? '' : part.textContent, left: box.left, right: box.right, top: box.top,"
        " bottom: box.bottom}; }));"
    )
    for drawing, *texts in boxes:
        for box in texts:
            assert box["left"] >= drawing["left"] - 1, box
            assert box["right"] <= drawing["right"] + 1, box
        for index, box in enumerate(texts):
            for other in texts[index + 1 :]:
                across = min(box["right"], other["right"]) - max(box["left"], other["left"])
                down = min(box["bottom"], other["bottom"]) - max(box["top"], other["top"])
                assert min(across, down) <= 3, (box, other)


def test_numbers_open_by_keyboard(browser: Chrome, written: Written) -> None:
    set_view(browser, 1280, 900)
    browser.get(written.html.as_uri())
    summary = browser.find_element(By.CSS_SELECTOR, "figure summary")
    table = browser.find_element(By.CSS_SELECTOR, "figure table")
    assert not table.is_displayed()
    summary.send_keys("\n")
    assert table.is_displayed()
    assert "requests in flight" in table.text
