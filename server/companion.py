"""A process that works beside the server on what the machine has to spare, and never outlives it."""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from anybit.engine.errors import AnyBitError

_POLL_SECONDS = 0.5
_EXIT_SECONDS = 5.0
_LOWEST_PRIORITY = 19
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of sys/prctl.h
_MAX_REASON_CHARACTERS = 300


async def run_companion(command: Sequence[str], on_poll: Callable[[], None]) -> None:
    """Run `command` to its end; AnyBitError, with the last it wrote to standard error, if that is a failure.

    `on_poll` is called about twice a second. A cancelled wait ends the process first. To be awaited in the server's
    main thread: the system ends the process together with the thread that started it.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "anybit.server.companion", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # Ctrl-C reaches the whole group; the server decides what it means
        )
        try:
            while process.poll() is None:
                on_poll()
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            await asyncio.to_thread(_end, process)
        if process.returncode != 0:
            errors.seek(0)
            raise AnyBitError(_reason(errors.read().decode(errors="replace"), process.returncode))


def main(parent: int, command: list[str]) -> None:
    """Become `command`, bound to the life of the process `parent`; ends at once if that has ended already."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    os.nice(_LOWEST_PRIORITY)
    # Niceness counts within a session only, where Linux groups processes by it; and only an idle process gives way at once.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(_LOWEST_PRIORITY))
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    # When memory runs out, requests matter more than this.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.execvp(command[0], command)


def _end(process: "subprocess.Popen[bytes]") -> None:
    for end in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, end)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_EXIT_SECONDS)


def _reason(output: str, code: int) -> str:
    """The sentence that a command of ours ends with, or what comes closest to it."""
    if code < 0:
        return f"It was ended by {signal.Signals(-code).name}, perhaps because memory ran out."
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    own = [line.removeprefix("anybit: ") for line in lines if line.startswith("anybit: ")]
    reason = (own or lines or [f"It ended with the code {code} and said nothing"])[-1]
    return reason[:_MAX_REASON_CHARACTERS].rstrip(".") + "."


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
