"""The step loop's body: schedule, run, sample, emit. Synchronous and free of processes, so that tests drive it directly."""

import logging
import time
from collections import Counter

from anybit.engine.errors import CapacityError
from anybit.engine.runner import Runner
from anybit.engine.scheduler import Scheduler
from anybit.engine.sequence import Sequence
from anybit.engine.types import EngineStats, FinishReason, GenerationRequest, TokenEvent
from anybit.kernels import fallbacks
from anybit.kvcache.allocator import PageAllocator
from anybit.kvcache.spec import KVSpec

logger = logging.getLogger("anybit.engine")

_MAX_STEP_RECORDS = 4096


class EngineCore:
    """One model, its cache and its requests."""

    def __init__(
        self,
        runner: Runner,
        spec: KVSpec,
        num_pages: int,
        max_num_seqs: int,
        max_step_tokens: int,
        max_model_len: int,
        bytes_read_per_step: dict[int, int],
        head_bytes_per_step: int,
    ) -> None:
        """`bytes_read_per_step` maps each served width to the bytes its linears read in one step, head not included."""
        self._runner = runner
        self._spec = spec
        self._allocator = PageAllocator(num_pages)
        self._scheduler = Scheduler(spec, self._allocator, max_num_seqs, max_step_tokens)
        self._max_model_len = max_model_len
        self._bytes_read_per_step = bytes_read_per_step
        self._head_bytes_per_step = head_bytes_per_step
        self._weight_bytes_read: Counter[int] = Counter()
        self._steps = 0
        self._step_tokens: list[int] = []

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, request: GenerationRequest) -> list[TokenEvent]:
        """Queue a request; a request that can never run is answered at once with an error event."""
        try:
            self._check(request)
            self._scheduler.add(Sequence(request, arrived_at=time.monotonic()))
        except CapacityError as error:
            return [TokenEvent(request.request_id, [], FinishReason.ERROR, error=str(error))]
        return []

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a request early; an unknown id (it may have just finished) is ignored."""
        sequence = self._scheduler.find(request_id)
        if sequence is None:
            return []
        self._scheduler.remove(sequence)
        return [TokenEvent(request_id, [], FinishReason.ABORT)]

    def abort_all(self) -> list[TokenEvent]:
        return [event for sequence in self._scheduler.sequences() for event in self.abort(sequence.request.request_id)]

    def step(self) -> list[TokenEvent]:
        """Compute one step and return what became known. A failing step ends its own sequences and no others."""
        chunks = self._scheduler.schedule(time.monotonic())
        if not chunks:
            return []
        try:
            plan, sampled = self._runner.run(chunks)
        except Exception:
            logger.exception("A step of %d sequences failed; they end with an error.", len(chunks))
            return [
                self._fail(chunk.sequence, "The model failed on this batch; see the server's log.") for chunk in chunks
            ]
        self._account(
            sum(chunk.num_tokens for chunk in chunks), {width for width, _, _ in plan.segments}, bool(sampled)
        )
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
        now = time.monotonic()
        return [self._advance(sequence, token, now) for sequence, token in sampled]

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()

    def take_stats(self, resident_bytes: int = 0) -> EngineStats:
        """A snapshot; the step records start anew."""
        step_tokens, self._step_tokens = self._step_tokens, []
        page_bytes = self._spec.page_bytes
        return EngineStats(
            running=self._scheduler.running_by_width(),
            waiting=self._scheduler.waiting_by_width(),
            kv_pages_total=self._allocator.num_pages,
            kv_pages_used=self._allocator.num_used,
            kv_bytes_total=self._allocator.num_pages * page_bytes,
            kv_bytes_used=self._allocator.num_used * page_bytes,
            steps=self._steps,
            step_tokens=step_tokens,
            weight_bytes_read=dict(self._weight_bytes_read),
            kernel_fallbacks=fallbacks.snapshot(),
            resident_bytes=resident_bytes,
        )

    def _check(self, request: GenerationRequest) -> None:
        if request.precision.bit_width not in self._bytes_read_per_step:
            raise CapacityError(f"Bit-width {request.precision.bit_width} is not loaded.")
        total = len(request.prompt_token_ids) + request.sampling.max_tokens
        if not request.prompt_token_ids or request.sampling.max_tokens < 1 or total > self._max_model_len:
            raise CapacityError(
                f"A prompt of {len(request.prompt_token_ids)} tokens with {request.sampling.max_tokens} more "
                f"does not fit the context of {self._max_model_len}."
            )

    def _advance(self, sequence: Sequence, token: int | None, now: float) -> TokenEvent:
        """Append a sampled token and tell whether the sequence goes on."""
        if token is None:
            return self._fail(sequence, "The model produced numbers that are not finite for this request.")
        sampling = sequence.request.sampling
        queue_seconds = prefill_seconds = None
        if sequence.first_token_at is None and sequence.scheduled_at is not None:
            sequence.first_token_at = now
            queue_seconds = sequence.scheduled_at - sequence.arrived_at
            prefill_seconds = now - sequence.scheduled_at
        reason: FinishReason | None = None
        token_ids = [token]
        if token in sampling.stop_token_ids:
            reason, token_ids = FinishReason.STOP, []
        else:
            sequence.token_ids.append(token)
            if sequence.num_generated >= sampling.max_tokens:
                reason = FinishReason.LENGTH
        if reason is not None:
            self._scheduler.remove(sequence)
        return TokenEvent(
            sequence.request.request_id, token_ids, reason, queue_seconds=queue_seconds, prefill_seconds=prefill_seconds
        )

    def _fail(self, sequence: Sequence, message: str) -> TokenEvent:
        self._scheduler.remove(sequence)
        return TokenEvent(sequence.request.request_id, [], FinishReason.ERROR, error=message)

    def _account(self, num_tokens: int, widths: set[int], used_head: bool) -> None:
        self._steps += 1
        if len(self._step_tokens) < _MAX_STEP_RECORDS:
            self._step_tokens.append(num_tokens)
        for width in widths:
            self._weight_bytes_read[width] += self._bytes_read_per_step[width]
        if used_head:
            # The head is read once for all widths of the step; charge it to the largest, so that sums stay true.
            self._weight_bytes_read[max(widths)] += self._head_bytes_per_step
