"""How fast linear layers are on an NVIDIA GPU, on their own and beside PyTorch's."""

import math
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.engine.bench.bandwidth import copy_bytes_per_second
from anybit.engine.bench.graph_timing import graph_seconds
from anybit.engine.bench.random_weight import random_weight
from anybit.engine.bench.shapes import Shape
from anybit.engine.machine import describe_device, free_bytes
from anybit.kernels import dispatch, layout
from anybit.kernels.duplicates import duplicates

_DEVICE = torch.device("cuda")
_MAX_COPIES = 64
_REPLAYS = 5
_INNER_TILES = 8  # of PyTorch's 4-bit weights

Product = Callable[[Tensor], Tensor]
"""x [rows, in] times one copy of a weight."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is timed: copies of a weight that rotate past the caches, and the bytes that one product reads of it."""

    bit_width: int | None
    peer: str | None
    num_bytes: int
    products: Sequence[Product]


def bench_cuda_kernels(
    shapes: Sequence[Shape],
    bit_widths: Sequence[int],
    batches: Sequence[int],
    group_size: int | None,
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    rotation_bytes: int = 256 << 20,
    is_fast: bool = True,
) -> dict[str, Any]:
    """The `bench kernels` report of CONTRACT for the GPU: medians over `rounds` alternating rounds.

    A call is `kernels.dispatch.linear` on bfloat16 rows, in a CUDA graph of calls on copies of a weight, of which at
    least `rotation_bytes` are read before one is read again. Rows with a `peer` are PyTorch's products of the same shape,
    timed in the same rounds: with a bfloat16 weight, and with a 4-bit one. `floor_share` is of a plain copy's bandwidth.
    """
    bandwidth = copy_bytes_per_second(_DEVICE)
    rows: list[dict[str, Any]] = []
    done, total = 0, len(shapes) * rounds * len(batches) * (len(bit_widths) + 2)
    for shape in shapes:
        group = group_size or layout.auto_group_size(shape.in_features)
        subjects = _subjects(shape, group, bit_widths, rotation_bytes, is_fast)
        samples: list[tuple[Subject, int, list[float]]] = [
            (subject, batch, []) for subject in subjects for batch in batches
        ]
        for _ in range(rounds):
            for subject, batch, seconds in samples:
                x = torch.randn(batch, shape.in_features, device=_DEVICE).bfloat16()
                calls = [lambda product=product, x=x: product(x) for product in subject.products]
                seconds.append(graph_seconds(calls, _REPLAYS))
                done += 1
                progress(done, total)
        for subject, batch, seconds in samples:
            rows.append(_row(shape, group, subject, batch, statistics.median(seconds), bandwidth))
    return {
        "device": describe_device(_DEVICE),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "copy_gb_per_second": bandwidth / 1e9,
        "fast": is_fast,
        "rows": rows,
    }


def _subjects(
    shape: Shape, group_size: int, bit_widths: Sequence[int], rotation_bytes: int, is_fast: bool
) -> list[Subject]:
    weight = random_weight(shape, group_size, bit_widths, _DEVICE)
    num_bytes = {width: weight.bytes_read(width) for width in bit_widths}
    dense_bytes = 2 * shape.out_features * shape.in_features
    served = dispatch.prepare(weight)
    del weight
    count = _num_copies(rotation_bytes, min(num_bytes.values()), dense_bytes)
    copies = duplicates(served, count)

    def nested(width: int) -> list[Product]:
        return [
            lambda x, copy=copy: dispatch.linear(x, copy, ((width, 0, len(x)),), is_fast=is_fast)  # type: ignore[misc]
            for copy in copies
        ]

    subjects = [Subject(width, None, num_bytes[width], nested(width)) for width in bit_widths]
    return [*subjects, _cublas(shape, dense_bytes, count), _int4pack(shape, group_size, rotation_bytes)]


def _cublas(shape: Shape, num_bytes: int, count: int) -> Subject:
    weights = [torch.randn(shape.out_features, shape.in_features, device=_DEVICE).bfloat16() for _ in range(count)]
    return Subject(
        None,
        "cublas-bf16",
        num_bytes,
        [lambda x, weight=weight: F.linear(x, weight) for weight in weights],  # type: ignore[misc]
    )


def _int4pack(shape: Shape, group_size: int, rotation_bytes: int) -> Subject:
    """PyTorch's 4-bit product (tinygemm), scale and zero in bfloat16 per group."""
    rows, columns = shape.out_features, shape.in_features
    num_bytes = rows * columns // 2 + rows * (columns // group_size) * 4
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=_DEVICE)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, _INNER_TILES)
    parts = torch.rand(columns // group_size, rows, 2, device=_DEVICE).bfloat16()
    copies = [(packed.clone(), parts.clone()) for _ in range(min(_MAX_COPIES, rotation_bytes // num_bytes + 1))]
    return Subject(
        4,
        "torch-int4pack",
        num_bytes,
        [
            lambda x, copy=copy: torch.ops.aten._weight_int4pack_mm(x, copy[0], group_size, copy[1])  # type: ignore[misc]
            for copy in copies
        ],
    )


def _num_copies(rotation_bytes: int, smallest: int, largest: int) -> int:
    room = free_bytes(_DEVICE) // 2 // (2 * largest)
    return max(1, min(math.ceil(rotation_bytes / smallest), _MAX_COPIES, room))


def _row(
    shape: Shape, group_size: int, subject: Subject, batch: int, seconds: float, bandwidth: float
) -> dict[str, Any]:
    return {
        "op": "linear",
        "out": shape.out_features,
        "in": shape.in_features,
        "m": batch,
        "bit_width": subject.bit_width,
        "group_size": group_size,
        "peer": subject.peer,
        "microseconds": seconds * 1e6,
        "bytes": subject.num_bytes,
        "gb_per_second": subject.num_bytes / seconds / 1e9,
        "floor_share": subject.num_bytes / bandwidth / seconds,
    }
