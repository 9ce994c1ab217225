"""Every query of every panel, rule and alert, asked of a real Prometheus that scrapes a real server under load."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import httpx
import pytest
import yaml

from tests.endtoend.command import ServeCommand
from tests.fixtures.grafana import build_dashboards, queries, render
from tests.fixtures.prometheus import RULES, PrometheusServer

WIDTHS = (2, 3, 4, 6, 8)
KV_FORMATS = ("bf16", "qet4", "uniform4")  # the last makes a CPU compute layer by layer, which counts as a fallback
PREFIX = "Once upon a time there was a model that could be read at any width. " * 3
QUERIES = [
    pytest.param(query, id=f"{name}: {query.panel['title']} {index}")
    for name, dashboard in queries.dashboards().items()
    for index, query in enumerate(queries.panel_queries(name, dashboard, rate_interval="1m"))
]
RULES_BY_KIND = {
    kind: [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
           if kind in rule]
    for kind in ("record", "alert")
}  # fmt: skip


def send_load(server: ServeCommand) -> None:
    """Requests at all widths and in all formats, whose prompts begin alike."""

    def ask(job: tuple[int, str, int]) -> None:
        width, kv_format, number = job
        body = {
            "prompt": f"{PREFIX}{number}", "max_tokens": 16, "temperature": 0, "ignore_eos": True,
            "bit_width": width, "kv_format": kv_format,
        }  # fmt: skip
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).status_code == 200

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, product(WIDTHS, KV_FORMATS, range(2))))


@pytest.fixture(scope="module")
def scraped(
    tiny_checkpoint: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[queries.Prometheus]:
    formats = ("--kv-format", KV_FORMATS[0], "--kv-formats", ",".join(KV_FORMATS[1:]))
    options = (*formats, "--kv-cache-mib", "24", "--shadow-rate", "1")
    with ServeCommand(tiny_checkpoint, *options, cache=cache) as server:
        prometheus = PrometheusServer(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{server.port}")
        try:
            api = queries.Prometheus(prometheus.url)
            prometheus.wait_for(lambda: api.query("anybit_ready == 1"), "the first scrape")
            send_load(server)
            for rule in (
                rule["record"] for rule in RULES_BY_KIND["record"] if rule["record"].startswith("model_bit_width")
            ):
                prometheus.wait_for(lambda rule=rule: widths_of(api.query(rule)) == widths_expected(rule), rule)
            yield api
        finally:
            prometheus.stop()


def widths_of(found: list[queries.Series]) -> set[str]:
    return {series.labels["bit_width"] for series in found if series.points}


def widths_expected(expression: str) -> set[str]:
    # The highest is what the others are compared with.
    return set(map(str, WIDTHS)) - ({"8"} if "shadow" in expression else set())


def has_data(found: list[queries.Series]) -> bool:
    return any(series.points for series in found)


@pytest.mark.parametrize("query", QUERIES)
def test_panel_shows_data(scraped: queries.Prometheus, query: queries.PanelQuery) -> None:
    now = time.time()
    found = scraped.query_range(query.expression, now - 60, now, 1)
    assert has_data(found), query.expression
    # A legend that names a label which no series has would be shown as it is written.
    assert all("{{" not in query.name(series.labels) for series in found)
    if query.panel["type"] != "timeseries":
        assert has_data(scraped.query(query.expression))


def test_panels_by_width_show_every_width(scraped: queries.Prometheus) -> None:
    dashboard = queries.dashboards()["bit-widths"]
    for query in queries.panel_queries("bit-widths", dashboard, rate_interval="1m"):
        if query.legend != "{{bit_width}} bits":
            continue
        assert widths_of(scraped.query(query.expression)) == widths_expected(query.expression), query.expression


@pytest.mark.parametrize("rule", RULES_BY_KIND["record"], ids=lambda rule: rule["record"])
def test_recording_rule_has_data(scraped: queries.Prometheus, rule: dict[str, str]) -> None:
    assert has_data(scraped.query(rule["expr"]))
    assert has_data(scraped.query(rule["record"]))


@pytest.mark.parametrize("rule", RULES_BY_KIND["alert"], ids=lambda rule: rule["alert"])
def test_alert_watches_something_that_is_there(scraped: queries.Prometheus, rule: dict[str, str]) -> None:
    """With `bool` a comparison gives 0 or 1 for each series instead of leaving those out for which it does not hold."""
    watched = re.sub(r"(==|[<>])(?= [0-9])", r"\1 bool", rule["expr"])
    assert watched != rule["expr"]
    found = [value for series in scraped.query(watched) for _, value in series.points]
    assert found
    assert set(found) <= {0.0, 1.0}


def test_healthy_server_fires_no_alert_but_that_of_its_slow_path(scraped: queries.Prometheus) -> None:
    assert {series.labels["alertname"] for series in scraped.query("ALERTS")} <= {"AnyBitSlowKernels"}


def test_pictures_are_drawn_from_the_same_queries(scraped: queries.Prometheus, tmp_path: Path) -> None:
    now = time.time()
    for name, dashboard in queries.dashboards().items():
        asked = list(queries.panel_queries(name, dashboard, "1m"))
        figure = render.draw(dashboard, asked, scraped, render.TimeSpan(now - 30, now))
        shown = [
            axes for axes in figure.axes if axes.lines or axes.collections or axes.patches or axes.texts or axes.tables
        ]
        assert len(shown) == len([panel for panel in dashboard["panels"] if panel["type"] != "row"])
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000


def test_files_are_what_their_descriptions_say() -> None:
    for path, text in build_dashboards.rendered().items():
        assert path.read_text() == text, "run python deploy/grafana/build_dashboards.py"
