"""How fast linear layers are on their own: time, bytes and share of the read bandwidth per shape, width and batch."""

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from anybit.engine.bench.bandwidth import copy_bytes_per_second
from anybit.engine.bench.random_weight import random_weight
from anybit.engine.bench.shapes import Shape
from anybit.engine.machine import (
    cpu_flags,
    describe_device,
    free_bytes,
    keep_freed_memory,
    physical_cores,
    use_threads,
)
from anybit.kernels import dispatch, layout
from anybit.kernels.cpu.bandwidth import ReadProbe
from anybit.kernels.cpu.bindings import get_threads
from anybit.kernels.cpu.threads import torch_on_all_threads
from anybit.kernels.duplicates import duplicates

ROTATION_BYTES = 1 << 30
_CPU = torch.device("cpu")
_MAX_COPIES = 4096  # beyond that the copies of a small weight are mostly Python objects
_MAX_RESIDENT_BYTES = 9 << 29
_SAMPLE_SECONDS = 0.1


def bench_kernels(
    shapes: Sequence[Shape],
    bit_widths: Sequence[int],
    batches: Sequence[int],
    group_size: int | None,
    threads: int,
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    rotation_bytes: int = ROTATION_BYTES,
) -> dict[str, Any]:
    """The `bench kernels` report of CONTRACT for this machine's CPU: medians over `rounds` alternating rounds.

    A call is `kernels.dispatch.linear` on float32 rows, as a model's layer makes it. Weights rotate past the caches:
    there are as many copies of a random weight as let at least `rotation_bytes` bytes be read, at any of the widths,
    before one of them is read again; memory may allow fewer, and a row's `rotation_bytes` says what came of it. Rounds
    go over all widths and batches of a shape, one shape after the other. `group_size` None means the largest that
    fits, `threads` 0 the physical cores.

    The read bandwidth that `floor_share` is a share of is measured in every round too, over `rotation_bytes` bytes, and
    the best counts. `bytes` are those of the weight at that width, codes and float part, without activations and results.
    `giga_weights_per_second` is out·in over the time of a call, whatever the number of rows m. Where `microseconds` is
    far above `fastest_microseconds`, the best round's, something else was using the machine.
    """
    keep_freed_memory()
    use_threads(threads or physical_cores(), _CPU)
    copy_bandwidth = copy_bytes_per_second(_CPU)
    probe, read_bandwidth = ReadProbe(rotation_bytes), 0.0
    cells = [(width, batch) for width in bit_widths for batch in batches]
    rows: list[dict[str, Any]] = []
    done, total = 0, len(shapes) * rounds * len(cells)
    progress(done, total)  # making the first copies takes a while
    for shape in shapes:
        rotation = Rotation(shape, group_size or layout.auto_group_size(shape.in_features), bit_widths, rotation_bytes)
        samples: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
        for width, batch in cells:
            rotation.call_seconds(width, batch, at_least=0)  # memory and threads that a first call must get
        for _ in range(rounds):
            read_bandwidth = max(read_bandwidth, probe.bytes_per_second())
            for width, batch in cells:
                samples[width, batch].append(rotation.call_seconds(width, batch))
                done += 1
                progress(done, total)
        rows += [_row(rotation, width, batch, samples[width, batch]) for width, batch in cells]
        del rotation  # the next shape needs the memory
    for row in rows:
        row["floor_share"] = row["bytes"] / read_bandwidth / (row["microseconds"] / 1e6)
    return {
        "device": f"{platform.machine()} {describe_device(_CPU)}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cpu_flags": cpu_flags(),
        "threads": get_threads() or torch.get_num_threads(),
        "copy_gb_per_second": copy_bandwidth / 1e9,
        "read_gb_per_second": read_bandwidth / 1e9,
        "rows": rows,
    }


class Rotation:
    """Copies of one weight that are used in turn, so that each is long out of the caches when its turn comes again."""

    def __init__(self, shape: Shape, group_size: int, bit_widths: Sequence[int], rotation_bytes: int) -> None:
        """`rotation_bytes` are to be read per turn at the narrowest of `bit_widths`; memory may allow fewer."""
        weight = random_weight(shape, group_size, bit_widths)
        self.shape = shape
        self.group_size = group_size
        self.bytes_read = {width: weight.bytes_read(width) for width in bit_widths}
        wanted = math.ceil(rotation_bytes / min(self.bytes_read.values()))
        resident_bytes = min(_MAX_RESIDENT_BYTES, free_bytes(_CPU) // 2)
        self.num_copies = max(1, min(wanted, _MAX_COPIES, resident_bytes // weight.nbytes))
        served = dispatch.prepare(weight)
        del weight
        with torch_on_all_threads():
            self._copies = duplicates(served, self.num_copies)
        self._next = 0

    def call_seconds(self, bit_width: int, batch: int, at_least: float = _SAMPLE_SECONDS) -> float:
        """Seconds of one call with `batch` rows: the mean over one turn, or over `at_least` seconds if that is shorter.

        Goes on where the last call ended, whichever width that had.
        """
        x = torch.randn(batch, self.shape.in_features)
        segments = ((bit_width, 0, batch),)
        calls, seconds = 0, 0.0
        started = time.perf_counter()
        while calls < self.num_copies and (calls == 0 or seconds < at_least):
            dispatch.linear(x, self._copies[self._next], segments)
            self._next = (self._next + 1) % self.num_copies
            calls += 1
            seconds = time.perf_counter() - started
        return seconds / calls


def _row(rotation: Rotation, width: int, batch: int, samples: Sequence[float]) -> dict[str, Any]:
    shape, num_bytes, seconds = rotation.shape, rotation.bytes_read[width], statistics.median(samples)
    return {
        "op": "linear",
        "out": shape.out_features,
        "in": shape.in_features,
        "m": batch,
        "bit_width": width,
        "group_size": rotation.group_size,
        "peer": None,
        "microseconds": seconds * 1e6,
        "fastest_microseconds": min(samples) * 1e6,
        "bytes": num_bytes,
        "gb_per_second": num_bytes / seconds / 1e9,
        "giga_weights_per_second": shape.out_features * shape.in_features / seconds / 1e9,
        "rotation_bytes": num_bytes * rotation.num_copies,
    }
