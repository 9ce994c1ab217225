"""From outcomes to numbers: percentiles, throughput, goodput, and the table that shows them."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

from rich.table import Table

from anybit.server.bench.answer import Answer, Failure
from anybit.server.bench.load import LoadResult

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a request must meet to count as good; None does not matter. A load is met by so large a `share` of them."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    share: float = 0.9

    @property
    def is_set(self) -> bool:
        return self.ttft_ms is not None or self.tpot_ms is not None

    def is_met(self, answer: Answer) -> bool:
        per_token = answer.seconds_per_token
        late = self.ttft_ms is not None and answer.first_token * 1e3 > self.ttft_ms
        slow = self.tpot_ms is not None and per_token is not None and per_token * 1e3 > self.tpot_ms
        return not late and not slow


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The value below which `percent` of 100 lie, between two neighbours in proportion."""
    position = (len(ascending) - 1) * percent / 100
    low, high = math.floor(position), math.ceil(position)
    return ascending[low] + (ascending[high] - ascending[low]) * (position - low)


def summarize(seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, percentiles and maximum in milliseconds; all None when there is nothing to summarize."""
    names = [f"p{percent}" for percent in PERCENTILES]
    if not seconds:
        return dict.fromkeys(["mean", *names, "max"])
    ascending = sorted(value * 1e3 for value in seconds)
    summary: dict[str, float | None] = {"mean": statistics.fmean(ascending)}
    summary |= {name: percentile(ascending, percent) for name, percent in zip(names, PERCENTILES, strict=True)}
    return summary | {"max": ascending[-1]}


def report_row(bit_width: int | None, rounds: Sequence[LoadResult], goal: Goal) -> dict[str, Any]:
    """One row of the report: all rounds of a width together. A width that was left to the server is the one it said."""
    outcomes = [outcome for result in rounds for outcome in result.outcomes]
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    messages: dict[str, str] = {}
    for failure in failures:
        messages.setdefault(failure.kind, failure.message)
    said = {answer.bit_width for answer in answers}
    seconds = sum(result.seconds for result in rounds)
    generated = sum(answer.generated_tokens for answer in answers)
    per_token = [answer.seconds_per_token for answer in answers]
    good = sum(map(goal.is_met, answers)) if goal.is_set else None
    return {
        "bit_width": said.pop() if bit_width is None and len(said) == 1 else bit_width,
        "requests": len(outcomes),
        "completed": len(answers),
        "failed": dict(Counter(failure.kind for failure in failures)),
        "messages": messages,
        "seconds": seconds,
        "prompt_tokens": _sum_known([answer.prompt_tokens for answer in answers]),
        "generated_tokens": generated,
        "requests_per_second": len(answers) / seconds,
        "tokens_per_second": generated / seconds,
        "goodput_requests_per_second": None if good is None else good / seconds,
        "goodput_share": None if good is None else good / len(outcomes),
        "ttft_ms": summarize([answer.first_token for answer in answers]),
        "itl_ms": summarize([gap for answer in answers for gap in answer.gaps]),
        "tpot_ms": summarize([value for value in per_token if value is not None]),
        "latency_ms": summarize([answer.last_token for answer in answers]),
        "client_cpu_share": sum(result.client_cpu_seconds for result in rounds) / seconds,
    }


def _sum_known(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def met_up_to(rows: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """Per width the highest load up to which each one measured was met by `share` of its requests, or no load at all.

    `rows` of a width are in ascending order of their loads.
    """
    highest: dict[int | None, dict[str, Any]] = {}
    for bit_width, of_width in groupby(rows, lambda row: row["bit_width"]):
        met = list(takewhile(lambda row: row["goodput_share"] >= share, of_width))
        load = {name: met[-1][name] if met else None for name in ("concurrency", "request_rate")}
        highest[bit_width] = {"bit_width": bit_width, **load}
    return list(highest.values())


def load_text(row: dict[str, Any]) -> str:
    """The load of a row, or of what else has its two fields, for people."""
    if row["request_rate"] == "inf":
        return "all at once"
    if row["request_rate"] is not None:
        return f"{row['request_rate']:g} requests/s"
    return "none" if row["concurrency"] is None else f"{row['concurrency']} at a time"


def report_table(report: dict[str, Any], title: str) -> Table:
    """The rows of a report for a terminal; those of several loads without gaps between tokens, to be narrow enough."""
    rows = report["rows"]
    with_loads = len({load_text(row) for row in rows}) > 1
    with_goodput = any(row["goodput_requests_per_second"] is not None for row in rows)
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("bits", lambda row: "default" if row["bit_width"] is None else str(row["bit_width"]))
    ]
    if with_loads and rows[0]["concurrency"] is not None:
        columns.append(("in flight", lambda row: str(row["concurrency"])))
    elif with_loads:
        columns.append(("asked/s", lambda row: str(row["request_rate"])))
    columns.append(("req/s", lambda row: f"{row['requests_per_second']:.2f}"))
    if with_goodput and with_loads:
        columns.append(("good", lambda row: f"{row['goodput_share']:.0%}"))
    elif with_goodput:
        columns.append(("good req/s", lambda row: f"{row['goodput_requests_per_second']:.2f}"))
    columns.append(("tok/s", lambda row: f"{row['tokens_per_second']:.1f}"))
    columns += [_time_column("TTFT p50", "ttft_ms", "p50"), _time_column("p99", "ttft_ms", "p99")]
    if not with_loads:
        columns += [_time_column("ITL p50", "itl_ms", "p50"), _time_column("p99", "itl_ms", "p99")]
    columns.append(_time_column("TPOT p50", "tpot_ms", "p50"))
    columns.append(("failed", lambda row: ", ".join(f"{n} × {kind}" for kind, n in row["failed"].items()) or "0"))
    table = Table(*(header for header, _ in columns), title=title)
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    return table


def _time_column(header: str, field: str, name: str) -> tuple[str, Callable[[dict[str, Any]], str]]:
    def cell(row: dict[str, Any]) -> str:
        milliseconds = row[field][name]
        return "" if milliseconds is None else f"{milliseconds:.1f}"

    return header, cell
