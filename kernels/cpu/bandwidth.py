"""How fast this machine reads memory: the floor under every operation that must go through a weight once."""

import time
from collections.abc import Callable

import torch

from anybit.kernels.cpu.bindings import native_library
from anybit.kernels.cpu.threads import torch_on_all_threads

_WORD_BYTES = 8
# PyTorch's threads look for more work for some milliseconds and would take cores from what is measured next.
_REST_SECONDS = 0.05


class ReadProbe:
    """Memory to be read in order, on all threads.

    What is measured is memory and not a cache only if `num_bytes` is far more than the caches hold.
    """

    def __init__(self, num_bytes: int) -> None:
        # Ones: pages that hold only zeros may all be one and the same.
        self._words = torch.ones(max(1, num_bytes // _WORD_BYTES), dtype=torch.int64)

    def bytes_per_second(self) -> float:
        """Bytes per second of reading everything once: natively or by PyTorch's sum, whichever is faster."""
        with torch_on_all_threads():
            seconds = _seconds(self._words.sum)
        time.sleep(_REST_SECONDS)
        native = native_library()
        if native is not None:
            read = native.anybit_read
            seconds = min(seconds, _seconds(lambda: read(self._words.data_ptr(), self._words.nbytes)))
        return self._words.nbytes / seconds


def read_bytes_per_second(num_bytes: int, rounds: int) -> float:
    """Bytes per second of reading `num_bytes` bytes of memory in order, the best of `rounds`."""
    probe = ReadProbe(num_bytes)
    return max(probe.bytes_per_second() for _ in range(rounds))


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
