"""The load of `bench serve`'s closed loop, given to an engine in this process: same prompts, same numbers in the report."""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from anybit.server.bench.answer import Answer, Failure
from anybit.server.bench.load import Load, LoadResult
from anybit.server.bench.report import Goal, report_row
from anybit.server.bench.run import BenchError, Progress
from anybit.server.bench.workload import Workload
from anybit.server.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from anybit.engine.bench.offline import OfflineAnswer, OfflineResult

RunLoad = Callable[[list[list[int]], int, Callable[[], None]], "OfflineResult"]
"""Answers prompts at a bit-width, with a call after each."""


@dataclass(frozen=True, slots=True)
class OfflineSettings:
    """As `BenchSettings` of a closed loop."""

    bit_widths: tuple[int, ...]
    max_tokens: int = 64
    concurrency: int = 8
    requests: int = 32
    rounds: int = 1
    warm_up: int = 1
    workload: Workload = field(default_factory=Workload)

    def to_json(self) -> dict[str, Any]:
        settings = asdict(self)
        workload = settings.pop("workload")
        return settings | {"seed": workload["seed"], "prompt_tokens": workload["prompt_tokens"]}


def bench_offline(
    run: RunLoad, tokenizer: PromptTokenizer, settings: OfflineSettings, progress: Progress = lambda done, total: None
) -> list[dict[str, Any]]:
    """Rows as those of `bench serve`, one per width, all of a width's rounds together.

    Raises BenchError when no request is answered.
    """
    num_done = 0

    def done() -> None:
        nonlocal num_done
        num_done += 1
        progress(num_done, len(settings.bit_widths) * settings.rounds * settings.requests)

    def prompts(first: int, count: int) -> list[list[int]]:
        return asyncio.run(_encode(tokenizer, settings.workload.prompts(first, count)))

    for width in settings.bit_widths:
        run(prompts(0, settings.warm_up), width, lambda: None)
    results: dict[int, list[LoadResult]] = {width: [] for width in settings.bit_widths}
    for round_index in range(settings.rounds):
        asked = prompts(settings.warm_up + round_index * settings.requests, settings.requests)
        for width in settings.bit_widths:
            results[width].append(_load_result(run(asked, width, done), width))
    load = Load("concurrency", settings.concurrency).to_json()
    rows = [report_row(width, rounds, Goal()) | load for width, rounds in results.items()]
    if not any(row["completed"] for row in rows):
        message = next(message for row in rows for message in row["messages"].values())
        raise BenchError(f"No request was answered: {message}")
    return rows


async def _encode(tokenizer: PromptTokenizer, texts: list[str]) -> list[list[int]]:
    """As /v1/completions does; that a prompt is too long is for the engine to say."""
    return [
        await tokenizer.encode(text, add_special_tokens=True, max_tokens=sys.maxsize, param="prompt") for text in texts
    ]


def _load_result(result: "OfflineResult", bit_width: int) -> LoadResult:
    return LoadResult([_outcome(answer, bit_width) for answer in result.answers], result.seconds, result.cpu_seconds)


def _outcome(answer: "OfflineAnswer", bit_width: int) -> Answer | Failure:
    if answer.error is not None:
        return Failure("error", answer.error)
    moments = answer.moments
    gaps = [after - before for before, after in pairwise(moments)]
    return Answer(moments[0], moments[-1], gaps, answer.num_prompt_tokens, len(moments), bit_width)
