"""Live quality: a share of what was answered is scored again, at its own width and at the highest, and compared."""

import asyncio
import contextlib
import logging
import math
import random
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, replace

from anybit.engine.client import EngineClient
from anybit.engine.errors import AnyBitError
from anybit.engine.precision import Precision
from anybit.engine.types import FinishReason, GenerationRequest, SamplingParams, TokenLogprob
from anybit.server.metrics.quality import QualityMetrics, ShadowOutcome

logger = logging.getLogger("anybit.server")

NUM_LIKELIEST = 32
"""Tokens per position whose probabilities are compared one by one; all others count as one."""

_MAX_TOKENS = 2048  # of prompt and answer together; longer ones are not scored
_MAX_PENDING = 8
# What float32 log probabilities leave of the others' share when there is none.
_NOTHING = 1e-6


@dataclass(frozen=True, slots=True)
class Comparison:
    """Sums over the compared tokens of one answer."""

    num_tokens: int
    kl_nats: float
    num_agreements: int  # the likeliest token is the same


class LiveQuality:
    """Lives on the event loop; scores one answer at a time, and gives up some rather than let them pile up."""

    def __init__(
        self, engine: EngineClient, rate: float, metrics: QualityMetrics, generator: random.Random | None = None
    ) -> None:
        """`rate` of the sequences (0 to 1) are compared."""
        self._engine = engine
        self._rate = rate
        self._metrics = metrics
        self._generator = generator or random.Random()
        self._pending: deque[tuple[GenerationRequest, list[int]]] = deque()
        self._working: asyncio.Task[None] | None = None
        self._stopped = False

    def wants(self, request: GenerationRequest) -> bool:
        """Whether the answer to this request, which is about to begin, shall be offered once it is there.

        The highest width is what others are compared with, and an answer that may have been lifted has no width of its own.
        """
        precision = request.precision
        if self._stopped or precision.at_least or precision.bit_width == self._highest_width:
            return False
        return self._generator.random() < self._rate

    def offer(self, request: GenerationRequest, answer: list[int]) -> None:
        """Score this answer when its turn comes."""
        too_long = len(request.prompt_token_ids) + len(answer) > _MAX_TOKENS
        if self._stopped or not answer or too_long or len(self._pending) >= _MAX_PENDING:
            self._metrics.count(request.precision.label, ShadowOutcome.SKIPPED)
            return
        self._pending.append((request, answer))
        if self._working is None or self._working.done():
            # Of no request's context: its log lines belong to none.
            self._working = asyncio.create_task(self._work(), context=Context())

    async def stop(self) -> None:
        """Give up what is pending; safe to call twice."""
        self._stopped = True
        self._pending.clear()
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)

    @property
    def _highest_width(self) -> int:
        model = self._engine.model
        return 0 if model is None else max(model.bit_widths)

    async def _work(self) -> None:
        while self._pending:
            request, answer = self._pending.popleft()
            label = request.precision.label
            try:
                comparison = await self._compare(request, answer)
            except AnyBitError as error:
                logger.warning("An answer of %s bits could not be scored again: %s", label, error)
                comparison = None
            except Exception:
                logger.exception("An answer of %s bits could not be scored again.", label)
                comparison = None
            if comparison is None:
                self._metrics.count(label, ShadowOutcome.FAILED)
            else:
                self._metrics.record(label, comparison.num_tokens, comparison.kl_nats, comparison.num_agreements)

    async def _compare(self, request: GenerationRequest, answer: list[int]) -> Comparison | None:
        """None if the engine failed, or other weights took over in between."""
        model = self._engine.model
        reference = await self._score(request, answer, Precision(self._highest_width))
        served = await self._score(request, answer, request.precision)
        if reference is None or served is None or self._engine.model is not model:
            return None
        return compare(reference, served)

    async def _score(
        self, request: GenerationRequest, answer: list[int], precision: Precision
    ) -> list[TokenLogprob] | None:
        """The distributions that the answer's tokens were drawn from, were they drawn at `precision`."""
        scoring = replace(
            request,
            request_id=f"shadow-{uuid.uuid4().hex}",
            prompt_token_ids=[*request.prompt_token_ids, *answer],
            sampling=SamplingParams(max_tokens=0, temperature=0, num_prompt_logprobs=NUM_LIKELIEST),
            precision=precision,
        )
        scores: list[TokenLogprob] = []
        events = self._engine.generate(scoring)
        async with contextlib.aclosing(events) as received:  # type: ignore[type-var]
            async for event in received:
                scores += event.prompt_logprobs
                if event.finish_reason is not None:
                    if event.finish_reason is not FinishReason.LENGTH:
                        return None
                    break
        return scores[-len(answer) :]


def compare(reference: Sequence[TokenLogprob], served: Sequence[TokenLogprob]) -> Comparison:
    """Distributions of the same positions, position by position."""
    return Comparison(
        num_tokens=len(reference),
        kl_nats=sum(kl_lower_bound(dict(p.top), dict(q.top)) for p, q in zip(reference, served, strict=True)),
        num_agreements=sum(p.top[0][0] == q.top[0][0] for p, q in zip(reference, served, strict=True)),
    )


def kl_lower_bound(reference: Mapping[int, float], served: Mapping[int, float]) -> float:
    """KL(reference || served) in nats of next-token distributions, of which only the likeliest tokens are known.

    Both map token ids to log probabilities. Tokens that are not in both count as one outcome, so this is the divergence
    of two coarser distributions: never more than that of the whole ones (data processing inequality), and equal to it
    where the others' ratios are the same.
    """
    common = reference.keys() & served.keys()
    divergence = sum(math.exp(reference[token]) * (reference[token] - served[token]) for token in common)
    others = 1.0 - sum(math.exp(reference[token]) for token in common)
    others_served = 1.0 - sum(math.exp(served[token]) for token in common)
    if others > _NOTHING:
        divergence += others * math.log(others / max(others_served, _NOTHING))
    return max(0.0, divergence)
