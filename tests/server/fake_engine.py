"""An engine without weights: token ids follow from prompt, seed and width, and every fault can be ordered."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from anybit.engine.errors import AnyBitError, EngineDrainingError, EngineLoadingError, EngineLostError
from anybit.engine.types import (
    EngineHealth,
    EngineState,
    EngineStats,
    FinishReason,
    GenerationRequest,
    KVFormatInfo,
    ModelInfo,
    TokenEvent,
    TokenLogprob,
    WidthInfo,
)

WIDTHS = (2, 3, 4, 8)


def model_info(vocab_size: int = 512, max_model_len: int = 256, eos_token_ids: tuple[int, ...] = (1,)) -> ModelInfo:
    return ModelInfo(
        name="tiny",
        checkpoint="checkpoint",
        checkpoint_hash="0" * 64,
        method="rtn",
        source="test",
        widths=[
            WidthInfo(
                bit_width=width,
                effective_bits=width + 0.25,
                effective_bits_with_head=width + 0.5,
                bytes_read_per_token=1000 * width,
                equivalent_bytes=1200 * width,
            )
            for width in WIDTHS
        ],
        default_bit_width=4,
        lm_head_bits=8,
        max_model_len=max_model_len,
        max_num_seqs=8,
        vocab_size=vocab_size,
        eos_token_ids=list(eos_token_ids),
        weights_bytes={"linear": 8000, "embedding": 2000, "norm": 10},
        kv_formats=[KVFormatInfo("bf16", 64, 4096), KVFormatInfo("qet4", 17.5, 8192, [0, 3])],
        device="cpu",
        compute_dtype="float32",
        reproducible=True,
        load_seconds=0.5,
    )


def fake_logprob(token_id: int, num_top: int) -> TokenLogprob:
    """The token itself is the second likeliest."""
    top = [(4, -0.5), (token_id, -1.0 - token_id), *((5 + rank, -600.0 - rank) for rank in range(20))]
    return TokenLogprob(token_id, -1.0 - token_id, top[:num_top])


@dataclass
class FakeEngine:
    """An EngineClient whose behaviour a test sets by its fields, also while requests run."""

    info: ModelInfo = field(default_factory=model_info)
    script: list[int] | None = None  # ids to emit instead of the computed ones
    loading: bool = False
    load_error: AnyBitError | None = None
    token_seconds: float = 0.0
    num_cached_tokens: int = 0
    tokens_per_event: int = 1
    fail_after: int | None = None  # the row fails after so many tokens
    lost_after: int | None = None  # the engine is lost after so many tokens
    abort_after: int | None = None  # the engine gives the row up after so many tokens
    ends_early_after: int | None = None  # the iterator ends without a reason
    crash_after: int | None = None  # an unexpected exception
    refuse: AnyBitError | None = None  # raised by generate
    hold: bool = False  # emit nothing while set
    silent_seconds: float = 0.0  # age of the last heartbeat
    state: EngineState = EngineState.READY
    snapshot: EngineStats = field(default_factory=EngineStats)
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: dict[str, GenerationRequest] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    closed: bool = False
    drained: bool = False
    loop: asyncio.AbstractEventLoop | None = None  # the server's, for tests that act from outside

    @property
    def model(self) -> ModelInfo | None:
        return None if self.loading or self.load_error else self.info

    async def wait_ready(self) -> ModelInfo:
        self.loop = asyncio.get_running_loop()
        while self.loading:
            await asyncio.sleep(0.005)
        if self.load_error is not None:
            raise self.load_error
        return self.info

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        if self.loading:
            raise EngineLoadingError("The model is still loading.")
        if self.state is EngineState.DRAINING:
            raise EngineDrainingError("The engine is draining.")
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        self.running[request.request_id] = request
        finished = False
        try:
            async for event in self._events(request):
                finished = event.finish_reason is not None
                yield event
        finally:
            del self.running[request.request_id]
            if not finished and request.request_id not in self.aborted:
                self.aborted.append(request.request_id)

    async def _events(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        ids, reason = self.tokens(request)
        request_id = request.request_id
        if request.sampling.num_prompt_logprobs is not None:
            scores = [fake_logprob(token, request.sampling.num_prompt_logprobs) for token in request.prompt_token_ids]
            for start in range(1, len(scores), 5):
                yield TokenEvent(request_id, [], prompt_logprobs=scores[start : start + 5])
        position = 0
        while True:
            # Always one turn of the loop, as with a real engine.
            await asyncio.sleep(self.token_seconds)
            while self.hold and request_id not in self.aborted:
                await asyncio.sleep(0.002)
            if self.state is EngineState.LOST or position == self.lost_after:
                raise EngineLostError("The engine process ended.")
            if position == self.crash_after:
                raise RuntimeError("a secret detail")
            if position == self.ends_early_after:
                return
            if position == self.fail_after:
                yield TokenEvent(request_id, [], FinishReason.ERROR, error="logits are not finite")
                return
            if request_id in self.aborted or position == self.abort_after:
                yield TokenEvent(request_id, [], FinishReason.ABORT)
                return
            batch = ids[position : position + self.tokens_per_event]
            first = position == 0
            position += len(batch)
            self.steps.append(len(batch))
            done = position >= len(ids)
            yield TokenEvent(
                request_id,
                batch,
                reason if done else None,
                queue_seconds=0.25 if first else None,
                prefill_seconds=0.5 if first else None,
                num_cached_tokens=self.num_cached_tokens if first else None,
                logprobs=[
                    fake_logprob(token, request.sampling.num_logprobs)
                    for token in batch
                    if request.sampling.num_logprobs is not None
                ],
            )
            if done:
                return

    def tokens(self, request: GenerationRequest) -> tuple[list[int], FinishReason]:
        """What `request` will get, stop tokens and limit applied."""
        sampling = request.sampling
        state = sum(request.prompt_token_ids) * 31 + sampling.seed * 17 + request.precision.bit_width
        emitted: list[int] = []
        for position in range(sampling.max_tokens):
            if self.script is not None:
                token = self.script[position] if position < len(self.script) else self.info.eos_token_ids[0]
            else:
                state = (state * 1103515245 + 12345) % 2**31
                token = 4 + (state >> 8) % (self.info.vocab_size - 4)
            if token in sampling.stop_token_ids:
                return emitted, FinishReason.STOP
            emitted.append(token)
        return emitted, FinishReason.LENGTH

    async def abort(self, request_id: str) -> None:
        if request_id in self.running:
            self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        return self.snapshot

    def take_step_tokens(self) -> list[int]:
        taken, self.steps = self.steps, []
        return taken

    def health(self) -> EngineHealth:
        state = EngineState.LOADING if self.loading and self.state is EngineState.READY else self.state
        return EngineHealth(state, "", self.silent_seconds)

    async def drain(self, timeout_seconds: float) -> None:
        self.state = EngineState.DRAINING
        self.drained = True
        end = time.monotonic() + timeout_seconds
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.005)
        for request_id in list(self.running):
            await self.abort(request_id)

    async def close(self) -> None:
        self.closed = True
