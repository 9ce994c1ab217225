"""An engine in a process of its own, seen from the server's event loop. Loads no torch."""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator

from anybit.engine.config import EngineConfig
from anybit.engine.errors import AnyBitError, EngineDrainingError, EngineLoadingError, EngineLostError
from anybit.engine.logs import DEFAULT_LOGS, LogSettings
from anybit.engine.messages import (
    FRAME_HEADER,
    Abort,
    AbortAll,
    Events,
    Failed,
    Generate,
    Heartbeat,
    Ready,
    Start,
    ToEngine,
    decode_from_engine,
    encode_frame,
)
from anybit.engine.types import (
    EngineHealth,
    EngineState,
    EngineStats,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    TokenEvent,
)

logger = logging.getLogger("anybit.engine.client")

_MAX_STEP_RECORDS = 65536
_EXIT_SECONDS = 5.0


class ProcessEngine:
    """Implements `engine.client.EngineClient` over a socket pair: no port, no file, nothing to connect to from outside.

    The engine ends when this process does, however it ends: the kernel closes the pair.
    """

    def __init__(self, config: EngineConfig, stall_seconds: float = 60.0, logs: LogSettings = DEFAULT_LOGS) -> None:
        config.check()
        self._config = config
        self._stall_seconds = stall_seconds
        self._logs = logs
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[ModelInfo] | None = None
        self._queues: dict[str, asyncio.Queue[TokenEvent]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._model: ModelInfo | None = None
        self._stats = EngineStats()
        self._step_tokens: deque[int] = deque(maxlen=_MAX_STEP_RECORDS)
        self._last_message_at = time.monotonic()
        self._draining = False
        self._lost: str | None = None

    @property
    def model(self) -> ModelInfo | None:
        return self._model

    async def start(self) -> None:
        """Spawn the engine; returns at once, while it loads."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "anybit.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_engine_environment(),
            )
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self._ready = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._reading = asyncio.create_task(self._read(reader))
        self._send(Start(self._config, self._logs))

    async def wait_ready(self) -> ModelInfo:
        if self._ready is None:
            raise EngineLoadingError("The engine has not been started.")
        return await asyncio.shield(self._ready)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        if self._lost is not None:
            raise EngineLostError(self._lost)
        if self._model is None:
            raise EngineLoadingError("The model is still loading; try again in a few seconds.")
        if self._draining:
            raise EngineDrainingError("The server is shutting down and accepts no new requests.")
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._queues[request.request_id] = events
        self._idle.clear()
        finished = False
        try:
            self._send(Generate(request))
            while not finished:
                event = await events.get()
                finished = event.finish_reason is not None
                if event.finish_reason is FinishReason.ERROR and self._lost is not None:
                    raise EngineLostError(self._lost)
                yield event
        finally:
            del self._queues[request.request_id]
            if not finished and self._lost is None:
                self._send(Abort(request.request_id))
            if not self._queues:
                self._idle.set()

    async def abort(self, request_id: str) -> None:
        if request_id in self._queues and self._lost is None:
            self._send(Abort(request_id))

    def stats(self) -> EngineStats:
        return self._stats

    def take_step_tokens(self) -> list[int]:
        taken = list(self._step_tokens)
        self._step_tokens.clear()
        return taken

    def health(self) -> EngineHealth:
        silence = time.monotonic() - self._last_message_at
        if self._lost is not None:
            return EngineHealth(EngineState.LOST, self._lost, silence)
        if self._model is None:
            return EngineHealth(EngineState.LOADING, seconds_since_heartbeat=silence)
        if self._queues and silence > self._stall_seconds:
            detail = f"The engine has work but has not reported for {silence:.0f} s."
            return EngineHealth(EngineState.STALLED, detail, silence)
        state = EngineState.DRAINING if self._draining else EngineState.READY
        return EngineHealth(state, seconds_since_heartbeat=silence)

    async def drain(self, timeout_seconds: float) -> None:
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_seconds)
        except TimeoutError:
            if self._lost is None:
                self._send(AbortAll())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._idle.wait(), _EXIT_SECONDS)

    async def close(self) -> None:
        self._draining = True
        if self._writer is not None:
            self._writer.close()
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        if self._process is not None:
            await asyncio.to_thread(_end, self._process)
        self._lose("The engine was closed.")

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        failure = "The engine process ended unexpectedly; see its log."
        try:
            while True:
                (size,) = FRAME_HEADER.unpack(await reader.readexactly(FRAME_HEADER.size))
                message = decode_from_engine(await reader.readexactly(size))
                self._last_message_at = time.monotonic()
                match message:
                    case Events(events):
                        for event in events:
                            if (queue := self._queues.get(event.request_id)) is not None:
                                queue.put_nowait(event)
                    case Heartbeat(stats):
                        self._stats = stats
                        self._step_tokens.extend(stats.step_tokens)
                    case Ready(model):
                        self._model = model
                        if self._ready is not None and not self._ready.done():
                            self._ready.set_result(model)
                    case Failed(text):
                        failure = text
        except (asyncio.IncompleteReadError, ConnectionError):
            self._lose(failure)

    def _lose(self, reason: str) -> None:
        if self._lost is not None:
            return
        self._lost = reason
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(AnyBitError(reason))
        for request_id, queue in self._queues.items():
            queue.put_nowait(TokenEvent(request_id, [], FinishReason.ERROR, error=reason))


def _engine_environment() -> dict[str, str]:
    """This environment with what only an engine wants: no tokenizer threads, and memory kept between steps."""
    return {"TOKENIZERS_PARALLELISM": "false", **os.environ}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The closed connection makes the engine end by itself; one stuck in a step is stopped."""
    try:
        process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
