"""Time spent on sealing pages."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SealClock:
    """Adds up the seconds of what runs under it: by the clock on a CPU, on a GPU between two events of its stream.

    A GPU is never waited for: what it has not done yet is counted later.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._pending.append((begin, end))
            self._add_what_is_done()  # here too, so that nothing piles up where nobody asks
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    @property
    def seconds(self) -> float:
        """Since the start."""
        self._add_what_is_done()
        return self._seconds

    def _add_what_is_done(self) -> None:
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._pending.popleft()
            self._seconds += begin.elapsed_time(end) / 1000
