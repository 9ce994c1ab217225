"""From outcomes to numbers: percentiles, throughput, goodput, and the table that shows them."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from anybit.server.bench.answer import Answer, Failure
from anybit.server.bench.load import LoadResult

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a request must meet to count as good; None does not matter."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

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
        "goodput_requests_per_second": sum(map(goal.is_met, answers)) / seconds if goal.is_set else None,
        "ttft_ms": summarize([answer.first_token for answer in answers]),
        "itl_ms": summarize([gap for answer in answers for gap in answer.gaps]),
        "tpot_ms": summarize([value for value in per_token if value is not None]),
        "latency_ms": summarize([answer.last_token for answer in answers]),
        "client_cpu_share": sum(result.client_cpu_seconds for result in rounds) / seconds,
    }


def _sum_known(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def report_table(report: dict[str, Any], title: str) -> Table:
    """The rows of a report for a terminal."""
    columns = ["bits", "req/s", "tok/s", "TTFT p50", "p99", "ITL p50", "p99", "TPOT p50", "failed"]
    with_goodput = any(row["goodput_requests_per_second"] is not None for row in report["rows"])
    if with_goodput:
        columns.insert(3, "good req/s")
    table = Table(*columns, title=title)
    for row in report["rows"]:
        cells = [
            "default" if row["bit_width"] is None else str(row["bit_width"]),
            f"{row['requests_per_second']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            *(_cell(row[name][key]) for name, key in _TIMES),
            ", ".join(f"{count} × {kind}" for kind, count in row["failed"].items()) or "0",
        ]
        if with_goodput:
            cells.insert(3, f"{row['goodput_requests_per_second']:.2f}")
        table.add_row(*cells)
    return table


_TIMES = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("itl_ms", "p50"), ("itl_ms", "p99"), ("tpot_ms", "p50"))


def _cell(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.1f}"
