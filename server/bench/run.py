"""The whole measurement of a server: widths in alternating rounds at each load, and the report."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from anybit.engine.errors import AnyBitError
from anybit.server.bench.client import BenchClient, Endpoint, http_client
from anybit.server.bench.load import Load, LoadResult, closed_loop, open_loop
from anybit.server.bench.report import Goal, met_up_to, report_row
from anybit.server.bench.resources import server_resources
from anybit.server.bench.target import find_target
from anybit.server.bench.workload import Workload, arrival_seconds
from anybit.server.version import anybit_version

Progress = Callable[[int, int], None]


class BenchError(AnyBitError):
    """Not one request was answered, so there is nothing to report."""


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is sent and how often; `loads` are all of one kind, ascending."""

    bit_width: str = ""  # as Target.choose reads it
    endpoint: Endpoint = "completions"
    max_tokens: int = 64
    loads: tuple[Load, ...] = (Load("concurrency", 8),)
    requests: int = 32
    rounds: int = 1
    warm_up: int = 1
    timeout_seconds: float = 600.0
    workload: Workload = field(default_factory=Workload)
    goal: Goal = field(default_factory=Goal)

    def to_json(self) -> dict[str, Any]:
        loads = [load.to_json() for load in self.loads]
        return {
            "bit_width": self.bit_width,
            "endpoint": self.endpoint,
            "max_tokens": self.max_tokens,
            "concurrency": _one_or_all([load["concurrency"] for load in loads]),
            "request_rate": _one_or_all([load["request_rate"] for load in loads]),
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
            "slo_share": self.goal.share,
        }


def _one_or_all(values: list[Any]) -> Any:
    """The value where there is one, None where none is set."""
    known = [value for value in values if value is not None]
    return known if len(known) > 1 else next(iter(known), None)


async def bench_serve(
    base_url: str,
    api_key: str | None,
    model: str | None,
    settings: BenchSettings,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The report of `anybit bench serve`: one row per width and load, all rounds together.

    Raises TargetError for a server that cannot be measured and BenchError when it answers no request.
    """
    async with http_client(base_url, api_key) as http:
        target = await find_target(http, base_url, model)
        widths = target.choose(settings.bit_width)
        client = BenchClient(
            http, base_url, target.model, settings.endpoint, settings.max_tokens, settings.timeout_seconds
        )
        results = await _measure(client, widths, settings, progress)
        rows = [row for width in widths for row in _rows_of_width(width, settings, results)]
        if not any(row["completed"] for row in rows):
            message = next(message for row in rows for message in row["messages"].values())
            raise BenchError(
                f"None of {sum(row['requests'] for row in rows)} requests was answered: {message.rstrip('.')}."
            )
        resources = await server_resources(http, base_url, target)
    return {
        "base_url": base_url,
        "model": target.model,
        "server": target.version,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"anybit": anybit_version(), "python": platform.python_version(), "httpx": version("httpx")},
        "settings": settings.to_json() | {"refused_fields": client.refused_fields},
        "rows": rows,
        "slo_met_up_to": met_up_to(rows, settings.goal.share) if settings.goal.is_set else None,
        "resources": resources,
    }


async def _measure(
    client: BenchClient, widths: list[int | None], settings: BenchSettings, progress: Progress
) -> dict[tuple[int | None, Load], list[LoadResult]]:
    results: dict[tuple[int | None, Load], list[LoadResult]] = {
        (width, load): [] for width in widths for load in settings.loads
    }
    num_done = 0

    def done() -> None:
        nonlocal num_done
        num_done += 1
        progress(num_done, len(results) * settings.rounds * settings.requests)

    for width in widths:
        await _warm_up(client, width, settings)
    for round_index in range(settings.rounds):
        for load_index, load in enumerate(settings.loads):
            place = round_index * len(settings.loads) + load_index
            for width in widths:
                results[width, load].append(await _round(client, width, load, place, settings, done))
    return results


def _rows_of_width(
    width: int | None, settings: BenchSettings, results: dict[tuple[int | None, Load], list[LoadResult]]
) -> list[dict[str, Any]]:
    """By load. One at which no answer said the width has that of the others."""
    rows = [report_row(width, results[width, load], settings.goal) | load.to_json() for load in settings.loads]
    said = {row["bit_width"] for row in rows} - {None}
    return [row | {"bit_width": next(iter(said))} for row in rows] if len(said) == 1 else rows


async def _warm_up(client: BenchClient, width: int | None, settings: BenchSettings) -> None:
    at_once = max((int(load.number) for load in settings.loads if load.kind == "concurrency"), default=8)
    prompts = settings.workload.prompts(0, settings.warm_up)
    await closed_loop(lambda prompt: client.ask(prompt, width), prompts, at_once, lambda: None)


async def _round(
    client: BenchClient, width: int | None, load: Load, place: int, settings: BenchSettings, done: Callable[[], None]
) -> LoadResult:
    """One round of one width at one load. Each place has prompts of its own, the same ones for all widths."""
    workload = settings.workload
    prompts = workload.prompts(settings.warm_up + place * settings.requests, settings.requests)

    async def ask(prompt: str) -> Any:
        return await client.ask(prompt, width)

    if load.kind == "concurrency":
        return await closed_loop(ask, prompts, int(load.number), done)
    arrivals = arrival_seconds(load.number, len(prompts), f"{workload.seed}/arrivals/{place}")
    return await open_loop(ask, prompts, arrivals, done)
