"""The step loop's body: schedule, run, sample, emit. Synchronous and free of processes, so that tests drive it directly."""

import logging
import time
from collections.abc import Sequence as ReadOnly

from anybit.engine.chunk import Chunk
from anybit.engine.device_memory import DeviceMemory
from anybit.engine.errors import CapacityError
from anybit.engine.runner import LaunchedStep, Runner, SampledToken, StepOutput
from anybit.engine.scheduler import Scheduler
from anybit.engine.sequence import Sequence
from anybit.engine.step_inputs import StepShape
from anybit.engine.types import EngineStats, FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from anybit.engine.weight_traffic import WeightTraffic
from anybit.kernels import fallbacks

logger = logging.getLogger("anybit.engine")

_MAX_STEP_RECORDS = 4096


class EngineCore:
    """One model, its cache and its requests."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        max_model_len: int,
        traffic: WeightTraffic,
        memory: DeviceMemory | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._max_model_len = max_model_len
        self._traffic = traffic
        self._memory = memory
        self._steps = 0
        self._step_tokens: list[int] = []
        self._ahead: LaunchedStep | None = None  # begun before the step before it was taken in

    @property
    def has_work(self) -> bool:
        return self._ahead is not None or self._scheduler.has_work

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
        """Finish one step and return what became known. A failing step ends its own sequences and no others.

        Where the runner can, the step after it begins before this one has ended, so that a GPU need not wait for us.
        """
        step, self._ahead = self._ahead, None
        if step is None:
            chunks = self._scheduler.schedule(time.monotonic())
            if not chunks:
                return []
            try:
                step = self._runner.launch(chunks)
            except Exception:
                return self._fail_step(chunks)
        try:
            if self._runner.can_launch_after(step) and self._scheduler.extend_ahead(step.chunks):
                self._ahead = self._runner.launch_after(step)
            output = step.result(self._ahead is not None)
            if output.is_undecided:  # once a request; what the step after it has written will be written again
                self._ahead = None
                running = self._scheduler.running
                alive = [chunk for chunk in step.chunks if chunk.sequence in running]
                output = self._runner.launch(alive).result(False) if alive else StepOutput(frozenset(), [])
        except Exception:
            self._ahead = None
            return self._fail_step(step.chunks)
        return self._take(output, step.chunks)

    def _take(self, output: StepOutput, chunks: ReadOnly[Chunk]) -> list[TokenEvent]:
        # Of a step that began early, some sequences may have ended meanwhile.
        running = self._scheduler.running
        chunks = [chunk for chunk in chunks if chunk.sequence in running]
        self._steps += 1
        if len(self._step_tokens) < _MAX_STEP_RECORDS:
            self._step_tokens.append(sum(chunk.num_tokens for chunk in chunks))
        used_head = bool(output.sampled or output.scored)
        self._traffic.record_step(output.widths, used_head, output.in_one_pass)
        self._scheduler.record(chunks)
        now = time.monotonic()
        events = [self._report_scores(sequence, scores) for sequence, scores in output.scored]
        return events + [self._advance(sampled, now) for sampled in output.sampled if sampled.sequence in running]

    def _fail_step(self, chunks: ReadOnly[Chunk]) -> list[TokenEvent]:
        """To be called while its exception is handled."""
        running = self._scheduler.running
        alive = [chunk.sequence for chunk in chunks if chunk.sequence in running]
        logger.exception("A step of %d sequences failed; they end with an error.", len(alive))
        return [self._fail(sequence, "The model failed on this batch; see the server's log.") for sequence in alive]

    @property
    def captures_steps(self) -> bool:
        """Whether decode steps are captured as graphs."""
        return self._runner.captures_steps

    def capture(self, shape: StepShape) -> bool:
        """Capture a decode step before one is needed; whether that was done. Not while there is work."""
        return self._runner.capture(shape)

    def compile_mixed(self, widths: tuple[int, ...], num_rows: int) -> None:
        """Compile what a step of these widths needs, from any thread, at any time."""
        self._runner.compile_mixed(widths, num_rows)

    def apart(self) -> "EngineCore":
        """Another core over the same model and pages: its steps are not counted and nobody finds its pages."""
        return EngineCore(self._runner, self._scheduler.apart(), self._max_model_len, self._traffic.from_zero())

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()

    @property
    def weight_bytes_read(self) -> int:
        """Since the start, at all widths."""
        return sum(self._traffic.bytes_read.values())

    def take_stats(self, resident_bytes: int = 0) -> EngineStats:
        """A snapshot; the step records start anew."""
        step_tokens, self._step_tokens = self._step_tokens, []
        books, counters, memory = self._scheduler.books, self._scheduler.counters, self._memory
        return EngineStats(
            running=self._scheduler.running_by_width(),
            waiting=self._scheduler.waiting_by_width(),
            kv_pages_total=books.pages_total,
            kv_pages_used=books.pages_used,
            kv_bytes_total=books.bytes_total(),
            kv_bytes_used=books.bytes_used(),
            kv_bytes_cached=books.bytes_cached(),
            prefix_queried_tokens=counters.prefix_queried_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            preemptions=counters.preemptions,
            sealed_pages=dict(counters.sealed_pages),
            seal_seconds=self._runner.seal_seconds,
            steps=self._steps,
            step_tokens=step_tokens,
            weight_bytes_read=self._traffic.bytes_read,
            kernel_fallbacks=fallbacks.snapshot(),
            resident_bytes=resident_bytes,
            device_memory={} if memory is None else memory.held_bytes(books),
            device_free_bytes=0 if memory is None else memory.free_bytes(),
        )

    def _check(self, request: GenerationRequest) -> None:
        if request.precision.bit_width not in self._traffic.bit_widths:
            raise CapacityError(f"Bit-width {request.precision.bit_width} is not loaded.")
        total = len(request.prompt_token_ids) + request.sampling.max_tokens
        if not request.prompt_token_ids or request.sampling.max_tokens < 0 or total > self._max_model_len:
            raise CapacityError(
                f"A prompt of {len(request.prompt_token_ids)} tokens with {request.sampling.max_tokens} more "
                f"does not fit the context of {self._max_model_len}."
            )

    def _report_scores(self, sequence: Sequence, scores: list[TokenLogprob]) -> TokenEvent:
        sequence.num_scored += len(scores)
        return TokenEvent(sequence.request.request_id, [], prompt_logprobs=scores)

    def _advance(self, sampled: SampledToken, now: float) -> TokenEvent:
        """Append a sampled token and tell whether the sequence goes on."""
        sequence, token = sampled.sequence, sampled.token_id
        if token is None:
            return self._fail(sequence, "The model produced numbers that are not finite for this request.")
        sampling = sequence.request.sampling
        queue_seconds = prefill_seconds = num_cached_tokens = None
        if sequence.first_token_at is None and sequence.scheduled_at is not None:
            sequence.first_token_at = now
            queue_seconds = sequence.scheduled_at - sequence.arrived_at
            prefill_seconds = now - sequence.scheduled_at
            num_cached_tokens = sequence.num_cached_tokens
        reason: FinishReason | None = None
        taken = True
        if sampling.max_tokens == 0:
            reason, taken = FinishReason.LENGTH, False
        elif token in sampling.stop_token_ids:
            reason, taken = FinishReason.STOP, False
        else:
            sequence.token_ids.append(token)
            if sequence.num_generated >= sampling.max_tokens:
                reason = FinishReason.LENGTH
        if reason is not None:
            self._scheduler.remove(sequence)
        return TokenEvent(
            sequence.request.request_id,
            [token] if taken else [],
            reason,
            queue_seconds=queue_seconds,
            prefill_seconds=prefill_seconds,
            num_cached_tokens=num_cached_tokens,
            logprobs=[sampled.logprob] if taken and sampled.logprob is not None else [],
        )

    def _fail(self, sequence: Sequence, message: str) -> TokenEvent:
        # What a failed sequence left in its pages may be the cause; nobody else shall read it.
        self._scheduler.remove(sequence, keep_pages=False)
        return TokenEvent(sequence.request.request_id, [], FinishReason.ERROR, error=message)
