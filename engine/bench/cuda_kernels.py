"""How fast linear layers are on an NVIDIA GPU, on their own and beside cuBLAS in bfloat16."""

import math
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from anybit.engine.bench.bandwidth import copy_bytes_per_second
from anybit.engine.bench.graph_timing import graph_seconds
from anybit.engine.bench.random_weight import random_weight
from anybit.engine.bench.shapes import Shape
from anybit.engine.machine import describe_device, free_bytes
from anybit.kernels import dispatch, layout
from anybit.kernels.duplicates import duplicates

PEER = "cublas-bf16"
_DEVICE = torch.device("cuda")
_MAX_COPIES = 64
_REPLAYS = 5


def bench_cuda_kernels(
    shapes: Sequence[Shape],
    bit_widths: Sequence[int],
    batches: Sequence[int],
    group_size: int | None,
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    rotation_bytes: int = 256 << 20,
) -> dict[str, Any]:
    """The `bench kernels` report of CONTRACT for the GPU: medians over `rounds` alternating rounds.

    A call is `kernels.dispatch.linear` on bfloat16 rows, in a CUDA graph of calls on copies of a weight, of which at
    least `rotation_bytes` are read before one is read again. Rows with a `peer` are PyTorch's product with a bfloat16
    weight of the same shape, timed in the same rounds. `floor_share` is of the bandwidth of a plain copy.
    """
    bandwidth = copy_bytes_per_second(_DEVICE)
    rows: list[dict[str, Any]] = []
    done, total = 0, len(shapes) * rounds * len(batches) * (len(bit_widths) + 1)
    for shape in shapes:
        group = group_size or layout.auto_group_size(shape.in_features)
        weight = random_weight(shape, group, bit_widths, _DEVICE)
        num_bytes: dict[int | None, int] = {width: weight.bytes_read(width) for width in bit_widths}
        num_bytes[None] = 2 * shape.out_features * shape.in_features
        served = dispatch.prepare(weight)
        del weight
        count = _num_copies(rotation_bytes, min(num_bytes.values()), num_bytes[None])
        copies = duplicates(served, count)
        dense = [torch.randn(shape.out_features, shape.in_features, device=_DEVICE).bfloat16() for _ in range(count)]
        samples: dict[tuple[int | None, int], list[float]] = {
            (width, batch): [] for width in num_bytes for batch in batches
        }
        for _ in range(rounds):
            for (width, batch), seconds in samples.items():
                x = torch.randn(batch, shape.in_features, device=_DEVICE).bfloat16()
                calls: list[Callable[[], object]] = (
                    [lambda matrix=matrix, x=x: F.linear(x, matrix) for matrix in dense]  # type: ignore[misc]
                    if width is None
                    else [
                        lambda copy=copy, x=x, part=((width, 0, batch),): dispatch.linear(x, copy, part)  # type: ignore[misc]
                        for copy in copies
                    ]
                )
                seconds.append(graph_seconds(calls, _REPLAYS))
                done += 1
                progress(done, total)
        for (width, batch), seconds in samples.items():
            rows.append(_row(shape, group, width, batch, statistics.median(seconds), num_bytes[width], bandwidth))
    return {
        "device": describe_device(_DEVICE),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "copy_gb_per_second": bandwidth / 1e9,
        "rows": rows,
    }


def _num_copies(rotation_bytes: int, smallest: int, largest: int) -> int:
    room = free_bytes(_DEVICE) // 2 // (2 * largest)
    return max(1, min(math.ceil(rotation_bytes / smallest), _MAX_COPIES, room))


def _row(
    shape: Shape, group_size: int, width: int | None, batch: int, seconds: float, num_bytes: int, bandwidth: float
) -> dict[str, Any]:
    return {
        "op": "linear",
        "out": shape.out_features,
        "in": shape.in_features,
        "m": batch,
        "bit_width": width,
        "group_size": group_size,
        "peer": PEER if width is None else None,
        "microseconds": seconds * 1e6,
        "bytes": num_bytes,
        "gb_per_second": num_bytes / seconds / 1e9,
        "floor_share": num_bytes / bandwidth / seconds,
    }
