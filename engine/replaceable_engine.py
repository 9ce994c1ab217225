"""An engine that can hand its work to another one while requests run. Loads no torch."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import fields, replace
from typing import Any

from anybit.engine.client import EngineClient
from anybit.engine.errors import EngineDrainingError
from anybit.engine.types import EngineHealth, EngineStats, GenerationRequest, ModelInfo, TokenEvent


class ReplaceableEngine:
    """Implements `engine.client.EngineClient` with the newest of the engines it was given.

    A request stays with the engine that it began in. For the server this is one engine throughout: there is never a
    moment without one, and its counters only grow.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._current = engine
        self._leaving: EngineClient | None = None
        self._past = EngineStats()  # the counters of engines that are gone
        self._past_step_tokens: list[int] = []
        self._draining = False

    @property
    def model(self) -> ModelInfo | None:
        return self._current.model

    def hand_over(self, successor: EngineClient) -> None:
        """Let `successor`, which must be ready, answer all requests from now on; `retire` must follow.

        Raises EngineDrainingError, and leaves everything as it is, if the server is about to end.
        """
        if self._draining:
            raise EngineDrainingError("The server is shutting down and keeps the engine it has.")
        self._current, self._leaving = successor, self._current

    async def retire(self, timeout_seconds: float) -> None:
        """Wait until the engine that handed over has finished its requests (or the time is up), then end it."""
        leaving = self._leaving
        if leaving is None:
            return
        await leaving.drain(timeout_seconds)
        # No wait until `_leaving` is None: nobody may see these counters twice, or not at all.
        self._past = _sum([self._past, _counters(leaving.stats())])
        self._past_step_tokens += leaving.take_step_tokens()
        self._leaving = None
        await leaving.close()

    async def wait_ready(self) -> ModelInfo:
        return await self._current.wait_ready()

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        # Not a generator of its own, which every token would pass through. Whoever asks for the first event without
        # waiting for anything else in between, as `async for` does, cannot meet an engine that has begun to leave.
        return self._current.generate(request)

    async def abort(self, request_id: str) -> None:
        for engine in self._engines:
            await engine.abort(request_id)

    def stats(self) -> EngineStats:
        stats = _sum([self._past, *(engine.stats() for engine in self._engines)])
        # They share one device.
        return replace(stats, device_free_bytes=self._current.stats().device_free_bytes)

    def take_step_tokens(self) -> list[int]:
        taken, self._past_step_tokens = self._past_step_tokens, []
        for engine in self._engines:
            taken += engine.take_step_tokens()
        return taken

    def health(self) -> EngineHealth:
        return self._current.health()

    async def drain(self, timeout_seconds: float) -> None:
        self._draining = True
        await asyncio.gather(*(engine.drain(timeout_seconds) for engine in self._engines))

    async def close(self) -> None:
        self._draining = True
        await asyncio.gather(*(engine.close() for engine in self._engines))

    @property
    def _engines(self) -> list[EngineClient]:
        return [self._current] if self._leaving is None else [self._current, self._leaving]


def _counters(stats: EngineStats) -> EngineStats:
    """Only what grows for ever; what an engine holds ends with it."""
    return EngineStats(
        prefix_queried_tokens=stats.prefix_queried_tokens,
        prefix_hit_tokens=stats.prefix_hit_tokens,
        preemptions=stats.preemptions,
        sealed_pages=stats.sealed_pages,
        seal_seconds=stats.seal_seconds,
        steps=stats.steps,
        weight_bytes_read=stats.weight_bytes_read,
        kernel_fallbacks=stats.kernel_fallbacks,
    )


def _sum(parts: Iterable[EngineStats]) -> EngineStats:
    totals: dict[str, Any] = {}
    for part in parts:
        for field in fields(EngineStats):
            value = getattr(part, field.name)
            # Of Counter's two sums only `update` keeps what is 0.
            if isinstance(value, dict):
                totals.setdefault(field.name, Counter()).update(value)
            else:
                totals[field.name] = totals[field.name] + value if field.name in totals else value
    return EngineStats(**totals)
