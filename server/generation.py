"""One checked request on its way through the engine: sequences in, pieces of text out."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

from anybit.engine.client import EngineClient
from anybit.engine.errors import AnyBitError, EngineLostError
from anybit.engine.types import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from anybit.server.admission import Ticket
from anybit.server.detokenizer import Detokenizer
from anybit.server.errors import Rejection, ServerFaultError, UnavailableError
from anybit.server.live_quality import LiveQuality
from anybit.server.logprobs import ReportedToken, report_tokens
from anybit.server.metrics.sequences import Outcome, WidthMetrics
from anybit.server.request_record import RequestOrigin, RequestRecord, SequenceRecord
from anybit.server.tokenizer import PromptTokenizer

logger = logging.getLogger("anybit.server")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one engine event added to one choice."""

    choice: int
    text: str
    num_tokens: int  # tokens of this choice so far
    finish_reason: str | None  # "stop" or "length" with the last piece of a choice
    tokens: list[ReportedToken] = field(default_factory=list)  # with log probabilities, if they were asked for


@dataclass(slots=True)
class _Sequence:
    """One choice while it is being generated."""

    request: GenerationRequest
    detokenizer: Detokenizer
    echo: str  # text before the answer, until it has been sent
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    reported_prompt: bool = False
    num_characters: int = 0  # of the text behind the reported tokens
    num_cached_tokens: int = 0
    outcome: Outcome | None = None
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    shadowed: list[int] | None = None  # token ids of an answer that will be scored again

    def record(self, outcome: Outcome) -> SequenceRecord:
        """What became of it; `outcome` if it came to no end of its own."""
        return SequenceRecord(
            self.outcome or outcome,
            self.detokenizer.num_tokens,
            self.queue_seconds,
            self.prefill_seconds,
            self.first_token_at,
            self.last_token_at,
        )


@dataclass(slots=True)
class Generation:
    """All sequences of one HTTP request; `close` must follow, whatever happened."""

    origin: RequestOrigin
    deadline: float  # time.monotonic()
    engine: EngineClient
    tokenizer: PromptTokenizer
    requests: list[GenerationRequest]
    stop: tuple[str, ...]
    num_choices: int  # per prompt
    echoes: list[str]  # per prompt, text that stands before its answers
    metrics: WidthMetrics
    ticket: Ticket
    observers: Sequence[Callable[[RequestRecord], None]]  # told at the end
    live_quality: LiveQuality | None
    _sequences: list[_Sequence] = field(init=False)
    _closed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._sequences = [
            _Sequence(
                request,
                Detokenizer(self.tokenizer.decoder(request.prompt_token_ids), self.stop),
                self.echoes[index // self.num_choices],
            )
            for index, request in enumerate(self.requests)
        ]
        if self.live_quality is not None:
            for sequence in self._sequences:
                sequence.shadowed = [] if self.live_quality.wants(sequence.request) else None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts; a prompt with several choices counts once."""
        return sum(len(request.prompt_token_ids) for request in self.requests[:: self.num_choices])

    @property
    def num_cached_tokens(self) -> int:
        """Those of the prompts' tokens that were cached when their first choice began."""
        return sum(sequence.num_cached_tokens for sequence in self._sequences[:: self.num_choices])

    @property
    def num_generated_tokens(self) -> int:
        return sum(sequence.detokenizer.num_tokens for sequence in self._sequences)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield one piece per engine event that brought something to show, until every choice is finished.

        Raises AnyBitError and APIError when the engine fails. Closing the generator early aborts what is left.
        """
        # One sequence needs no queue between it and its reader.
        events = self._numbered_events(0) if len(self._sequences) == 1 else self._merged_events()
        num_open = len(self._sequences)
        async with contextlib.aclosing(events):
            async for choice, event in events:
                sequence = self._sequences[choice]
                if sequence.outcome is not None:
                    continue  # sent before the engine learned of the stop string
                piece = self._take(choice, event)
                if piece is None:
                    continue
                if piece.finish_reason is not None:
                    num_open -= 1
                    if event.finish_reason is None:
                        await self._abort(sequence)
                yield piece
                if num_open == 0:
                    return

    def close(self, outcome: Outcome) -> None:
        """Leave the queue and account for every sequence; those without an end of their own get `outcome`."""
        if self._closed:
            return
        self._closed = True
        self.ticket.release()
        now = time.monotonic()
        for sequence in self._sequences:
            first, last = sequence.first_token_at, sequence.last_token_at
            decode_seconds = None if first is None or last is None else last - first
            self.metrics.record_end(sequence.outcome or outcome, now - self.origin.arrival, decode_seconds)
            if self.live_quality is not None and sequence.shadowed is not None and sequence.outcome is not None:
                self.live_quality.offer(sequence.request, sequence.shadowed)
        record = RequestRecord(
            origin=self.origin,
            bit_width=self.requests[0].precision.label,
            kv_format=self.requests[0].kv_format or "",
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            end=now,
            sequences=tuple(sequence.record(outcome) for sequence in self._sequences),
        )
        for observe in self.observers:
            observe(record)

    def _take(self, choice: int, event: TokenEvent) -> Piece | None:
        sequence = self._sequences[choice]
        detokenizer = sequence.detokenizer
        self._check_end(event)
        sequence.prompt_logprobs += event.prompt_logprobs
        num_tokens_before = detokenizer.num_tokens
        text = detokenizer.push(event.token_ids)
        num_tokens = detokenizer.num_tokens - num_tokens_before
        self._record(choice, event, num_tokens)
        if not event.token_ids and event.finish_reason is None:
            return None  # a part of a long prompt was scored
        if sequence.shadowed is not None:
            sequence.shadowed += event.token_ids[:num_tokens]
        tokens = self._report(sequence, event.token_ids[:num_tokens], event.logprobs[:num_tokens])
        finish_reason = None
        if event.finish_reason is not None or detokenizer.stopped:
            text += detokenizer.finish()
            finish_reason = FinishReason.STOP if detokenizer.stopped else event.finish_reason
            sequence.outcome = Outcome.LENGTH if finish_reason is FinishReason.LENGTH else Outcome.STOP
        echo, sequence.echo = sequence.echo, ""
        return Piece(choice, echo + text, detokenizer.num_tokens, finish_reason, tokens)

    def _report(self, sequence: _Sequence, token_ids: list[int], logprobs: list[TokenLogprob]) -> list[ReportedToken]:
        """The tokens that the next piece tells the log probabilities of, an echoed prompt's before the first."""
        sampling, texts = sequence.request.sampling, self.tokenizer.texts
        if sampling.num_logprobs is None:
            return []
        tokens: list[ReportedToken] = []
        if sampling.num_prompt_logprobs is not None and not sequence.reported_prompt:
            sequence.reported_prompt = True
            prompt = sequence.request.prompt_token_ids
            # A BOS that only the tokens have lies before the text; so does what a tokenizer puts before a first word.
            length = sum(map(texts.num_characters, prompt))
            tokens = [
                replace(token, text_offset=max(0, token.text_offset))
                for token in report_tokens(
                    prompt, sequence.prompt_logprobs, len(sequence.echo) - length, texts, frozenset()
                )
            ]
            sequence.prompt_logprobs = []
            sequence.num_characters = len(sequence.echo)
        hidden = self.tokenizer.special_token_ids
        tokens += report_tokens(token_ids, logprobs, sequence.num_characters, texts, hidden)
        sequence.num_characters += sum(
            texts.num_characters(token_id) for token_id in token_ids if token_id not in hidden
        )
        return tokens

    def _check_end(self, event: TokenEvent) -> None:
        if event.finish_reason is FinishReason.ERROR:
            logger.error("request %s: sequence %s failed: %s", self.origin.request_id, event.request_id, event.error)
            raise ServerFaultError("The engine could not finish this request; try again.")
        if event.finish_reason is FinishReason.ABORT:
            # Not asked for here, so the engine is giving up what it has.
            message = "The server ended this request because it is shutting down; try again elsewhere or later."
            raise UnavailableError(message, code="draining", reason=Rejection.DRAINING)

    def _record(self, choice: int, event: TokenEvent, num_tokens: int) -> None:
        sequence = self._sequences[choice]
        self.ticket.started(choice)
        self.metrics.record_scheduled(event.queue_seconds, event.prefill_seconds)
        if event.prefill_seconds is not None:
            sequence.queue_seconds, sequence.prefill_seconds = event.queue_seconds, event.prefill_seconds
        sequence.num_cached_tokens += event.num_cached_tokens or 0
        if num_tokens == 0:
            return
        now = time.monotonic()
        if sequence.last_token_at is None:
            sequence.first_token_at = now
            num_prompt_tokens = len(sequence.request.prompt_token_ids)
            self.metrics.record_first_tokens(num_prompt_tokens, num_tokens, now - self.origin.arrival)
        else:
            self.metrics.record_next_tokens(num_tokens, now - sequence.last_token_at)
        sequence.last_token_at = now

    async def _merged_events(self) -> AsyncGenerator[tuple[int, TokenEvent], None]:
        """The events of all sequences as they come; the first failure of one ends them all."""
        arrived: asyncio.Queue[tuple[int, TokenEvent] | None] = asyncio.Queue()

        async def pump(choice: int) -> None:
            try:
                async with contextlib.aclosing(self._numbered_events(choice)) as events:
                    async for item in events:
                        arrived.put_nowait(item)
            finally:
                arrived.put_nowait(None)

        pumps = [asyncio.create_task(pump(choice)) for choice in range(len(self._sequences))]
        try:
            num_running = len(pumps)
            while num_running > 0:
                item = await arrived.get()
                if item is not None:
                    yield item
                    continue
                num_running -= 1
                for task in pumps:
                    if task.done():
                        task.result()
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _numbered_events(self, choice: int) -> AsyncGenerator[tuple[int, TokenEvent], None]:
        """The engine's events of one sequence, up to the one that finishes it; left early, the sequence is aborted."""
        events = self.engine.generate(self._sequences[choice].request)
        try:
            async for event in events:
                yield choice, event
                if event.finish_reason is not None:
                    return
        finally:
            if isinstance(events, AsyncGenerator):
                await events.aclose()
        raise EngineLostError("The engine stopped answering in the middle of this request; try again.")

    async def _abort(self, sequence: _Sequence) -> None:
        # An engine that is gone has nothing left to abort.
        with contextlib.suppress(AnyBitError):
            await self.engine.abort(sequence.request.request_id)
