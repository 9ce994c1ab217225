"""Kernels of steps of several widths, compiled beside the engine before a step needs them.

Which widths meet in a step is up to the requests, and each set of widths has kernels of its own: too many to wait for at the
start, and a second or more each to wait for when requests do. They stay in the kernels' cache for later starts.
"""

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

from anybit.engine.types import ModelInfo

logger = logging.getLogger("anybit.engine")

MixedStep = tuple[tuple[int, ...], int]
"""Widths of a step, ascending, and its rows."""

_ROWS = (8, 16, 32, 48, 64)
"""Products have kernels for up to so many rows; what more rows need is among them."""
_LOWEST_PRIORITY = 19
_STOP_SECONDS = 10.0  # a compilation takes a few


class CompileAhead:
    """A thread that calls `compile_step` for one step after the other; the compiler runs outside of Python's lock."""

    def __init__(self, compile_step: Callable[[tuple[int, ...], int], None], steps: Sequence[MixedStep]) -> None:
        self._compile_step = compile_step
        self._steps = steps
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="compile-ahead", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the kernel that is being compiled: the compiler must not be at work when the process ends."""
        self._stopping.set()
        self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # of this thread alone, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        started = time.monotonic()
        try:
            for widths, num_rows in self._steps:
                if self._stopping.is_set():
                    return
                self._compile_step(widths, num_rows)
        except Exception:
            logger.exception("Kernels of mixed steps were not compiled ahead; they will be when requests need them.")
            return
        logger.info("Kernels for steps of several widths are there after %.0f s.", time.monotonic() - started)


def mixed_steps(model: ModelInfo) -> list[MixedStep]:
    """The likeliest first: of few widths, then of few rows. What pads each width may make many rows of few sequences."""
    widths = sorted(model.bit_widths)
    most_widths = min(len(widths), model.max_num_seqs)
    return [
        (together, rows)
        for count in range(2, most_widths + 1)
        for rows in _ROWS
        for together in itertools.combinations(widths, count)
    ]
