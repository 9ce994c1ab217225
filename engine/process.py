"""The engine process: reads messages, steps, answers. Run by `ProcessEngine`, never by hand."""

import gc
import logging
import queue
import signal
import socket
import sys
import threading
import time

from anybit.engine.assemble import assemble
from anybit.engine.compile_ahead import CompileAhead, mixed_steps
from anybit.engine.core import EngineCore
from anybit.engine.errors import AnyBitError
from anybit.engine.logs import configure_logging
from anybit.engine.machine import resident_bytes
from anybit.engine.messages import (
    Abort,
    AbortAll,
    EngineChannel,
    Events,
    Failed,
    Generate,
    Heartbeat,
    Ready,
    Start,
    ToEngine,
)
from anybit.engine.types import TokenEvent
from anybit.engine.warm_up import WarmUp

logger = logging.getLogger("anybit.engine")

_HEARTBEAT_SECONDS = 0.25
_IDLE_SECONDS = 1.0
_QUIET_SECONDS = 0.1  # before each piece of the warm-up: whoever asks again at once waits for none


def main(file_descriptor: int) -> int:
    """Serve one connection until the other end closes it; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides what it means
    channel = EngineChannel(socket.socket(fileno=file_descriptor))
    start = channel.receive()
    if not isinstance(start, Start):
        return 1
    configure_logging(start.logs)
    try:
        core, info = assemble(start.config)
    except AnyBitError as error:
        channel.send(Failed(str(error)))
        return 1
    except Exception as error:
        logger.exception("Loading failed.")
        channel.send(Failed(f"The engine could not load the model: {type(error).__name__}: {error}"))
        return 1
    warm_up = WarmUp(core, info)
    warm_up.before_serving()
    # What is loaded stays until the end: the collector need not look at it again and again between steps.
    gc.freeze()
    compiling = CompileAhead(core.compile_mixed, mixed_steps(info)) if core.captures_steps else None
    try:
        channel.send(Ready(info))
        _serve(core, channel, warm_up)
    except (BrokenPipeError, ConnectionResetError):
        logger.info("The server is gone; the engine ends.")
    finally:
        if compiling is not None:
            compiling.stop()
    return 0


def _serve(core: EngineCore, channel: EngineChannel, warm_up: WarmUp) -> None:
    inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
    threading.Thread(target=_receive_all, args=(channel, inbox), daemon=True).start()
    last_heartbeat = 0.0
    was_busy = True
    while True:
        idle_seconds = _QUIET_SECONDS if warm_up.has_more else _IDLE_SECONDS
        events, connected = _handle(core, inbox, 0 if core.has_work else idle_seconds)
        if not connected:
            return
        is_idle = not core.has_work
        if not is_idle:
            events += core.step()
        if events:
            channel.send(Events(events))
        if (was_busy or not is_idle) and not core.has_work:
            core.check_integrity()
        now = time.monotonic()
        if now - last_heartbeat >= _HEARTBEAT_SECONDS or was_busy != core.has_work:
            channel.send(Heartbeat(core.take_stats(resident_bytes())))
            last_heartbeat = now
        was_busy = core.has_work
        if is_idle:
            warm_up.capture_next()


def _receive_all(channel: EngineChannel, inbox: "queue.SimpleQueue[ToEngine | None]") -> None:
    try:
        while (message := channel.receive()) is not None:
            inbox.put(message)
    except OSError:
        pass  # a reset connection is an end of file in other clothes
    inbox.put(None)


def _handle(
    core: EngineCore, inbox: "queue.SimpleQueue[ToEngine | None]", wait_seconds: float
) -> tuple[list[TokenEvent], bool]:
    """Apply every message that has arrived, waiting so long for a first one; False when the server is gone."""
    events: list[TokenEvent] = []
    try:
        message = inbox.get(timeout=wait_seconds) if wait_seconds else inbox.get_nowait()
        while True:
            match message:
                case None:
                    return events, False
                case Generate(request):
                    events += core.add(request)
                case Abort(request_id):
                    events += core.abort(request_id)
                case AbortAll():
                    events += core.abort_all()
            message = inbox.get_nowait()
    except queue.Empty:
        return events, True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
