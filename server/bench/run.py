"""The whole measurement of a server: widths in alternating rounds, and the report."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from anybit.engine.errors import AnyBitError
from anybit.server.bench.client import BenchClient, Endpoint, http_client
from anybit.server.bench.load import LoadResult, closed_loop, open_loop
from anybit.server.bench.report import Goal, report_row
from anybit.server.bench.target import Target, find_target
from anybit.server.bench.workload import Workload, arrival_seconds
from anybit.server.version import anybit_version

Progress = Callable[[int, int], None]


class BenchError(AnyBitError):
    """Not one request was answered, so there is nothing to report."""


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is sent and how often; `request_rate` None means a closed loop of `concurrency` users."""

    bit_width: str = ""  # as Target.choose reads it
    endpoint: Endpoint = "completions"
    max_tokens: int = 64
    concurrency: int = 8
    request_rate: float | None = None
    requests: int = 32
    rounds: int = 1
    warm_up: int = 1
    timeout_seconds: float = 600.0
    workload: Workload = field(default_factory=Workload)
    goal: Goal = field(default_factory=Goal)

    def to_json(self) -> dict[str, Any]:
        return {
            "bit_width": self.bit_width,
            "endpoint": self.endpoint,
            "max_tokens": self.max_tokens,
            "concurrency": self.concurrency if self.request_rate is None else None,
            # JSON has no infinity.
            "request_rate": "inf" if self.request_rate == float("inf") else self.request_rate,
            "requests": self.requests,
            "rounds": self.rounds,
            "warm_up": self.warm_up,
            "timeout_seconds": self.timeout_seconds,
            "seed": self.workload.seed,
            "prompts_given": len(self.workload.lines),
            "prompt_tokens": None if self.workload.lines else self.workload.prompt_tokens,
            "shared_prefix_tokens": self.workload.shared_prefix_tokens,
            "slo_ttft_ms": self.goal.ttft_ms,
            "slo_tpot_ms": self.goal.tpot_ms,
        }


async def bench_serve(
    base_url: str,
    api_key: str | None,
    model: str | None,
    settings: BenchSettings,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The report of `anybit bench serve`: one row per width, all of a width's rounds together.

    Raises TargetError for a server that cannot be measured and BenchError when it answers no request.
    """
    async with http_client(base_url, api_key) as http:
        target = await find_target(http, base_url, model)
        widths = target.choose(settings.bit_width)
        client = BenchClient(
            http, base_url, target.model, settings.endpoint, settings.max_tokens, settings.timeout_seconds
        )
        results = await _measure(client, widths, settings, progress)
    rows = [report_row(width, results[width], settings.goal) for width in widths]
    if not any(row["completed"] for row in rows):
        message = next(message for row in rows for message in row["messages"].values())
        raise BenchError(
            f"None of {sum(row['requests'] for row in rows)} requests was answered: {message.rstrip('.')}."
        )
    return _report(base_url, target, client, settings, rows)


async def _measure(
    client: BenchClient, widths: list[int | None], settings: BenchSettings, progress: Progress
) -> dict[int | None, list[LoadResult]]:
    results: dict[int | None, list[LoadResult]] = {width: [] for width in widths}
    num_done = 0

    def done() -> None:
        nonlocal num_done
        num_done += 1
        progress(num_done, len(widths) * settings.rounds * settings.requests)

    for width in widths:
        await _load(client, width, settings, None, lambda: None)
    for round_index in range(settings.rounds):
        for width in widths:
            results[width].append(await _load(client, width, settings, round_index, done))
    return results


async def _load(
    client: BenchClient,
    width: int | None,
    settings: BenchSettings,
    round_index: int | None,
    done: Callable[[], None],
) -> LoadResult:
    """One round of one width, None the warm-up. Every round has prompts of its own, the same ones for all widths."""
    workload = settings.workload

    async def ask(prompt: str) -> Any:
        return await client.ask(prompt, width)

    if round_index is None:
        return await closed_loop(ask, workload.prompts(0, settings.warm_up), settings.concurrency, done)
    prompts = workload.prompts(settings.warm_up + round_index * settings.requests, settings.requests)
    if settings.request_rate is None:
        return await closed_loop(ask, prompts, settings.concurrency, done)
    arrivals = arrival_seconds(settings.request_rate, len(prompts), f"{workload.seed}/arrivals/{round_index}")
    return await open_loop(ask, prompts, arrivals, done)


def _report(
    base_url: str, target: Target, client: BenchClient, settings: BenchSettings, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "base_url": base_url,
        "model": target.model,
        "server": target.version,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {"anybit": anybit_version(), "python": platform.python_version(), "httpx": version("httpx")},
        "settings": settings.to_json() | {"refused_fields": client.refused_fields},
        "rows": rows,
    }
