"""When requests are sent: so many at a time (closed loop), or at given times whatever the server does (open loop)."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from anybit.server.bench.answer import Answer, Failure

Ask = Callable[[str], Awaitable[Answer | Failure]]


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests in flight, or begun per second."""

    kind: Literal["concurrency", "request_rate"]
    number: float  # an int of the first kind

    def to_json(self) -> dict[str, Any]:
        """Both kinds by name, None for the other one. JSON has no infinity."""
        return {"concurrency": None, "request_rate": None, self.kind: "inf" if self.number == math.inf else self.number}


@dataclass(frozen=True, slots=True)
class LoadResult:
    """`seconds` from the first request sent to the last outcome, and how many of them this process computed."""

    outcomes: list[Answer | Failure]
    seconds: float
    client_cpu_seconds: float


async def closed_loop(ask: Ask, prompts: Sequence[str], concurrency: int, done: Callable[[], None]) -> LoadResult:
    """`concurrency` users of whom each sends the next prompt as soon as its last one is answered."""
    outcomes: list[Answer | Failure] = []
    waiting = iter(prompts)

    async def user() -> None:
        for prompt in waiting:
            outcomes.append(await ask(prompt))
            done()

    clock = _Clock()
    async with asyncio.TaskGroup() as users:
        for _ in range(min(concurrency, len(prompts))):
            users.create_task(user())
    return clock.stop(outcomes)


async def open_loop(
    ask: Ask, prompts: Sequence[str], arrivals: Sequence[float], done: Callable[[], None]
) -> LoadResult:
    """Each prompt at its time in `arrivals` (ascending, in seconds)."""
    outcomes: list[Answer | Failure] = []

    async def send(prompt: str) -> None:
        outcomes.append(await ask(prompt))
        done()

    clock = _Clock()
    async with asyncio.TaskGroup() as requests:
        for prompt, arrival in zip(prompts, arrivals, strict=True):
            # Against the clock and not the last arrival, or delays of this loop would add up and lower the rate.
            wait = clock.started + arrival - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            requests.create_task(send(prompt))
    return clock.stop(outcomes)


class _Clock:
    def __init__(self) -> None:
        self.started = time.perf_counter()
        self._cpu_started = time.process_time()

    def stop(self, outcomes: list[Answer | Failure]) -> LoadResult:
        return LoadResult(outcomes, time.perf_counter() - self.started, time.process_time() - self._cpu_started)
