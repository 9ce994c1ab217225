"""How fast linear layers are on an NVIDIA GPU, on their own and beside PyTorch's."""

import functools
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
from anybit.kernels.cuda import linear as cuda
from anybit.kernels.cuda.activations import prepare_activations
from anybit.kernels.cuda.fragments import FragmentWeight
from anybit.kernels.dispatch import ServedWeight
from anybit.kernels.duplicates import duplicates

_DEVICE = torch.device("cuda")
_MAX_COPIES = 64
_REPLAYS = 5
_INNER_TILES = 8  # of PyTorch's 4-bit weights

Call = Callable[[], object]
"""A product with one copy of a weight."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is timed: `calls` on bfloat16 x [rows, in], each with its own copy of a weight, of which it reads `num_bytes`.

    There are none where x is not multiplied that way.
    """

    op: str
    bit_width: int | None
    peer: str | None
    num_bytes: int
    calls: Callable[[Tensor], Sequence[Call]]


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

    Calls run in a CUDA graph on copies of a weight, of which at least `rotation_bytes` are read before one is read again.
    The op `linear` is `kernels.dispatch.linear` on bfloat16 rows; `product` is the part of it that a decoder's layer is left
    with, where the kernel before has prepared its inputs. Rows with a `peer` are PyTorch's products of the same shape, timed
    in the same rounds: with a bfloat16 weight, and with a 4-bit one. `floor_share` is of a plain copy's bandwidth.
    """
    bandwidth = copy_bytes_per_second(_DEVICE)
    rows: list[dict[str, Any]] = []
    done, total = 0, len(shapes) * rounds * len(batches) * 2 * (len(bit_widths) + 1)
    for shape in shapes:
        group = group_size or layout.auto_group_size(shape.in_features)
        subjects = _subjects(shape, group, bit_widths, rotation_bytes, is_fast)
        samples: list[tuple[Subject, int, list[float]]] = [
            (subject, batch, []) for subject in subjects for batch in batches
        ]
        for _ in range(rounds):
            for subject, batch, seconds in samples:
                x = torch.randn(batch, shape.in_features, device=_DEVICE).bfloat16()
                if calls := subject.calls(x):
                    seconds.append(graph_seconds(calls, _REPLAYS))
                done += 1
                progress(done, total)
        for subject, batch, seconds in samples:
            if seconds:
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

    subjects: list[Subject] = []
    for width in bit_widths:
        options = (width, None, num_bytes[width])
        subjects.append(Subject("linear", *options, functools.partial(_nested_linears, copies, width, is_fast)))
        subjects.append(Subject("product", *options, functools.partial(_nested_products, copies, width, is_fast)))
    return [*subjects, _cublas(shape, dense_bytes, count), _int4pack(shape, group_size, rotation_bytes)]


def _nested_linears(copies: Sequence[ServedWeight], width: int, is_fast: bool, x: Tensor) -> list[Call]:
    segments = ((width, 0, len(x)),)
    return [functools.partial(dispatch.linear, x, copy, segments, is_fast=is_fast) for copy in copies]


def _nested_products(copies: Sequence[ServedWeight], width: int, is_fast: bool, x: Tensor) -> list[Call]:
    """None where the whole weight is dequantized, or the GPU's own kernels can't be built."""
    packed = [copy for copy in copies if isinstance(copy, FragmentWeight)]
    form = (cuda.fast_form if is_fast else cuda.exact_form)(len(x), packed[0]) if packed else None
    if form is None:
        return []
    prepared = prepare_activations(x, form)
    y = torch.empty(len(x), packed[0].out_features, dtype=x.dtype, device=x.device)
    return [functools.partial(cuda.multiply, prepared, copy, width, None, y) for copy in packed]


def _cublas(shape: Shape, num_bytes: int, count: int) -> Subject:
    weights = [torch.randn(shape.out_features, shape.in_features, device=_DEVICE).bfloat16() for _ in range(count)]
    return Subject(
        "linear",
        None,
        "cublas-bf16",
        num_bytes,
        lambda x: [functools.partial(F.linear, x, weight) for weight in weights],
    )


def _int4pack(shape: Shape, group_size: int, rotation_bytes: int) -> Subject:
    """PyTorch's 4-bit product (tinygemm), scale and zero in bfloat16 per group."""
    rows, columns = shape.out_features, shape.in_features
    num_bytes = rows * columns // 2 + rows * (columns // group_size) * 4
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=_DEVICE)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, _INNER_TILES)
    parts = torch.rand(columns // group_size, rows, 2, device=_DEVICE).bfloat16()
    copies = [(packed.clone(), parts.clone()) for _ in range(min(_MAX_COPIES, rotation_bytes // num_bytes + 1))]
    multiply = torch.ops.aten._weight_int4pack_mm
    return Subject(
        "linear",
        4,
        "torch-int4pack",
        num_bytes,
        lambda x: [functools.partial(multiply, x, codes, group_size, parts) for codes, parts in copies],
    )


def _num_copies(rotation_bytes: int, smallest: int, largest: int) -> int:
    room = free_bytes(_DEVICE) // 2 // (2 * largest)
    return max(1, min(math.ceil(rotation_bytes / smallest), _MAX_COPIES, room))


def _row(
    shape: Shape, group_size: int, subject: Subject, batch: int, seconds: float, bandwidth: float
) -> dict[str, Any]:
    return {
        "op": subject.op,
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
