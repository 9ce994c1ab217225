"""From outcomes to the row of a report."""

import io
import json
import random
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from anybit.server.bench.answer import Answer, Failure
from anybit.server.bench.load import Load, LoadResult
from anybit.server.bench.report import (
    PERCENTILES,
    Goal,
    load_text,
    met_up_to,
    percentile,
    report_row,
    report_table,
    summarize,
)
from tests.server.bench_reports import CLOSED, OPEN, sample_report


def answer(first: float = 0.1, last: float = 0.5, tokens: int = 5, width: int | None = 4) -> Answer:
    gap = (last - first) / (tokens - 1) if tokens > 1 else 0.0
    return Answer(first, last, [gap] * (tokens - 1), 10, tokens, width)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
def test_percentiles_are_those_of_numpy(count: int) -> None:
    generator = random.Random(count)
    values = sorted(generator.expovariate(1.0) for _ in range(count))
    for percent in (0, 1, 37.5, *PERCENTILES, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-12)


def test_summary_is_in_milliseconds_and_needs_no_order() -> None:
    summary = summarize([0.003, 0.001, 0.002])
    assert list(summary) == ["mean", "p50", "p90", "p95", "p99", "max"]
    assert summary["mean"] == summary["p50"] == pytest.approx(2)
    assert summary["max"] == pytest.approx(3)


def test_summary_of_nothing_has_the_same_keys() -> None:
    assert summarize([]) == dict.fromkeys(summarize([1.0]))


def test_row_pools_rounds() -> None:
    rounds = [
        LoadResult([answer(first=0.1), Failure("429", "full"), Failure("429", "fuller")], 2.0, 0.5),
        LoadResult([answer(first=0.3), Failure("timeout", "late")], 3.0, 1.0),
    ]
    row = report_row(4, rounds, Goal())
    assert (row["bit_width"], row["requests"], row["completed"]) == (4, 5, 2)
    assert row["failed"] == {"429": 2, "timeout": 1}
    assert row["messages"] == {"429": "full", "timeout": "late"}
    assert (row["seconds"], row["prompt_tokens"], row["generated_tokens"]) == (5.0, 20, 10)
    assert (row["requests_per_second"], row["tokens_per_second"]) == (0.4, 2.0)
    assert row["goodput_requests_per_second"] is None
    assert row["ttft_ms"]["mean"] == pytest.approx(200)
    assert row["tpot_ms"]["max"] == pytest.approx(100)
    assert row["itl_ms"]["mean"] == pytest.approx(75)
    assert row["latency_ms"]["p50"] == pytest.approx(500)
    assert row["client_cpu_share"] == pytest.approx(0.3)
    json.dumps(row, allow_nan=False)


def test_row_without_an_answer_has_no_times() -> None:
    row = report_row(8, [LoadResult([Failure("5xx", "broken")], 1.0, 0.1)], Goal(ttft_ms=5))
    assert row["tokens_per_second"] == row["goodput_requests_per_second"] == 0
    assert row["latency_ms"]["p99"] is None


def test_row_of_the_default_width_says_which_that_is() -> None:
    assert report_row(None, [LoadResult([answer(width=4)], 1.0, 0.1)], Goal())["bit_width"] == 4
    assert report_row(None, [LoadResult([answer(width=None)], 1.0, 0.1)], Goal())["bit_width"] is None


@pytest.mark.parametrize(
    ("goal", "good"),
    [(Goal(ttft_ms=150), 3), (Goal(tpot_ms=150), 3), (Goal(150, 150), 2), (Goal(ttft_ms=50), 0), (Goal(tpot_ms=50), 1)],
)
def test_goodput_counts_what_meets_every_goal(goal: Goal, good: int) -> None:
    fine, late, slow = answer(), answer(first=0.3, last=0.7), answer(last=0.9)
    single = answer(last=0.1, tokens=1)  # has no time per further token that could be too long
    row = report_row(4, [LoadResult([fine, late, slow, single, Failure("5xx", "")], 2.0, 0.1)], goal)
    assert row["goodput_requests_per_second"] == good / 2
    assert row["goodput_share"] == good / 5  # a request that failed has not met it


def shares(bit_width: int | None, *shares: float) -> list[dict[str, Any]]:
    loads = (1, 2, 4, 8)
    return [
        {"bit_width": bit_width, "concurrency": load, "request_rate": None, "goodput_share": share}
        for load, share in zip(loads, shares, strict=False)
    ]


@pytest.mark.parametrize(
    ("measured", "highest"),
    [
        ((1.0, 0.95, 0.9), 4),
        ((1.0, 0.89, 1.0), 1),  # what a lower load misses, a higher one meets by chance
        ((0.5, 1.0), None),
    ],
)
def test_goal_is_met_up_to_the_first_load_that_misses_it(measured: tuple[float, ...], highest: int | None) -> None:
    rows = shares(2, *measured) + shares(8, 1.0)
    first, second = met_up_to(rows, 0.9)
    assert first == {"bit_width": 2, "concurrency": highest, "request_rate": None}
    assert second == {"bit_width": 8, "concurrency": 1, "request_rate": None}


def printed(report: dict[str, Any]) -> str:
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(report_table(report, "title"))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("loads", [CLOSED, OPEN])
def test_table_of_a_sweep_fits_a_terminal(loads: tuple[Load, ...]) -> None:
    text = printed(sample_report(loads))
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert len(lines) == 9  # no cell is wrapped
    assert "…" not in text
    assert [line.split("│")[2].strip() for line in lines[:3]] == [str(load.to_json()[load.kind]) for load in loads]


def test_table_of_one_load_has_the_gaps_and_no_load() -> None:
    text = printed(sample_report(CLOSED[:1]))
    assert "ITL" in text
    assert "flight" not in text


@pytest.mark.parametrize(
    ("concurrency", "rate", "text"),
    [(4, None, "4 at a time"), (None, 0.5, "0.5 requests/s"), (None, "inf", "all at once"), (None, None, "none")],
)
def test_loads_are_named(concurrency: int | None, rate: float | str | None, text: str) -> None:
    assert load_text({"concurrency": concurrency, "request_rate": rate}) == text
