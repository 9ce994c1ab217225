"""Nested linear layers and embeddings on an NVIDIA GPU, through the tensor cores' integer instructions."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from anybit.kernels import layout
from anybit.kernels.cuda.activations import MAX_TOKEN_TILES, Activations, num_token_tiles, quantize_activations
from anybit.kernels.cuda.driver import (
    Argument,
    can_launch,
    defined,
    has_warpgroups,
    integers,
    load_kernel,
    pointers,
)
from anybit.kernels.cuda.fragments import FragmentWeight
from anybit.kernels.cuda.tuning import FEW_ROWS, BatchOperands, BatchTiling, Tiling, choose_batch_tiling, choose_tiling
from anybit.kernels.cuda.values import PARTS, VALUES
from anybit.kernels.nested import NestedWeight
from anybit.kernels.widths import TileWidths, WidthSegment

ACTIVATION_ERROR = 1 / 32638
"""Largest error of an activation as a share of its group's largest magnitude."""
_EMBEDDING_THREADS = 256
_DEQUANTIZE_WARPS = 4
_FEW_TOKENS, _MANY_TOKENS = 16, 256  # for warpgroups


class _Weight(ctypes.Structure):
    """`Weight` of source/nested.cuh."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("c2", "c3", "c4", "c6", "c8", "high", "low")]


class _MixedWeight(ctypes.Structure):
    """`MixedWeight` of source/nested.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("c2", "c3", "c4", "c6", "c8")),
        ("parts", ctypes.c_void_p * len(layout.BIT_WIDTHS)),
    ]


def can_pack(weight: NestedWeight) -> bool:
    """Whether the GPU's kernels can be built here and know this weight's number types."""
    part = next(iter(weight.affine.values())).scale
    return part.dtype in PARTS and can_launch(part.device)


def linear(x: Tensor, weight: FragmentWeight, segments: Sequence[WidthSegment], bias: Tensor | None = None) -> Tensor:
    """x Ŵᵀ (+ bias), each segment (bit_width, start, stop) of rows at its width: [tokens, in] -> [tokens, out] in x's dtype.

    A row's result depends on that row and its width alone.
    """
    absent = [width for width, _, _ in segments if width not in weight.bit_widths]
    if absent:
        raise ValueError(f"The weight was not loaded at {absent[0]} bits.")
    x = x.contiguous()
    y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    for width, start, stop in segments:
        if stop > start:
            pass_tiles = choose_pass_tiles(stop - start, weight)
            activations = quantize_activations(x[start:stop], weight.group_size, pass_tiles=pass_tiles)
            multiply(activations, weight, width, bias, y[start:stop])
    return y


def choose_pass_tiles(tokens: int, weight: FragmentWeight) -> int:
    """N-tiles of a pass for the faster kernel: warpgroups need many tokens, or rows, to pay."""
    if not has_warpgroups(weight.device) or tokens <= _FEW_TOKENS:
        return 1
    if tokens < _MANY_TOKENS and weight.out_features <= FEW_ROWS:
        return 1
    return min(num_token_tiles(tokens), 2 * MAX_TOKEN_TILES)


def multiply(
    activations: Activations,
    weight: FragmentWeight,
    bit_width: int,
    bias: Tensor | None,
    y: Tensor,
    tiling: Tiling | BatchTiling | None = None,
) -> None:
    """Write the product at `bit_width` to y [tokens, out]; bias float32 [out]. `tiling` None takes the best known one."""
    if activations.pass_tiles > 1:
        _launch_batch(activations, weight, bit_width, bias, y, tiling if isinstance(tiling, BatchTiling) else None)
    else:
        _launch(activations, weight, bit_width, bias, y, tiling if isinstance(tiling, Tiling) else None, None)


def multiply_mixed(
    activations: Activations, weight: FragmentWeight, widths: TileWidths, bias: Tensor | None, y: Tensor
) -> None:
    """`multiply` with each row at its own width, bit for bit, while the weight is read once at the widest of them."""
    _launch(activations, weight, max(widths.present), bias, y, None, widths)


def _launch(
    activations: Activations,
    weight: FragmentWeight,
    bit_width: int,
    bias: Tensor | None,
    y: Tensor,
    tiling: Tiling | None,
    widths: TileWidths | None,
) -> None:
    token_tiles = min(activations.digits.shape[0], MAX_TOKEN_TILES)
    tiling = tiling or choose_tiling(weight.out_features, weight.in_features, bit_width, token_tiles)
    shared_bytes = tiling.shared_bytes(token_tiles)
    part_dtype = next(iter(weight.parts.values())).dtype
    constants = product_constants(tiling, bit_width, weight.group_size, part_dtype, y.dtype, token_tiles)
    if widths is not None:
        constants["WIDTHS"] = sum(1 << width for width in widths.present)
    kernel = load_kernel("linear_decode", "nested_linear_decode", defined(**constants), shared_bytes)
    arguments: list[Argument] = [
        _describe(weight, bit_width) if widths is None else _describe_mixed(weight),
        *pointers(None if widths is None else widths.of_tiles, activations.digits, activations.scales, bias, y),
        *integers(activations.tokens, activations.slots, weight.out_features, weight.row_tiles, weight.column_tiles),
    ]
    passes = activations.digits.shape[0] // token_tiles
    blocks = -(-weight.row_tiles // (tiling.row_warps * tiling.row_tiles))
    kernel.launch((tiling.cluster, passes, blocks), tiling.threads, arguments, shared_bytes)


def _launch_batch(
    activations: Activations,
    weight: FragmentWeight,
    bit_width: int,
    bias: Tensor | None,
    y: Tensor,
    tiling: BatchTiling | None,
) -> None:
    passes, _, pass_tiles, _ = activations.digits.shape
    part_dtype = next(iter(weight.parts.values())).dtype
    operands = BatchOperands(bit_width, weight.group_size, part_dtype.itemsize, pass_tiles)
    tiling = tiling or choose_batch_tiling(weight.out_features, weight.in_features, passes, operands)
    shared_bytes = tiling.shared_bytes(operands)
    constants = batch_constants(tiling, bit_width, weight.group_size, part_dtype, y.dtype, pass_tiles)
    kernel = load_kernel("linear_batch", "nested_linear_batch", defined(**constants), shared_bytes)
    arguments: list[Argument] = [
        _describe(weight, bit_width),
        *pointers(activations.digits, activations.scales, bias, y),
        *integers(activations.tokens, activations.slots, weight.out_features, weight.row_tiles, weight.column_tiles),
    ]
    blocks = -(-weight.row_tiles // tiling.row_tiles)
    kernel.launch((tiling.cluster, passes, blocks), tiling.threads, arguments, shared_bytes)


def batch_constants(
    tiling: BatchTiling, bit_width: int, group_size: int, part_dtype: torch.dtype, dtype: torch.dtype, pass_tiles: int
) -> dict[str, int]:
    """What `source/linear_batch.cu` is compiled for."""
    return {
        **_constants(bit_width, group_size, part_dtype),
        "VALUE": VALUES[dtype],
        "PASS_TILES": pass_tiles,
        "WARPGROUPS": tiling.warpgroups,
        "CLUSTER": tiling.cluster,
        "SEGMENTS": tiling.segments,
        "STAGES": tiling.stages,
    }


def product_constants(
    tiling: Tiling, bit_width: int, group_size: int, part_dtype: torch.dtype, dtype: torch.dtype, token_tiles: int
) -> dict[str, int]:
    """What `source/linear_decode.cu` is compiled for."""
    return {
        **_constants(bit_width, group_size, part_dtype),
        "VALUE": VALUES[dtype],
        "TOKEN_TILES": token_tiles,
        "ROW_TILES": tiling.row_tiles,
        "ROW_WARPS": tiling.row_warps,
        "COLUMN_WARPS": tiling.column_warps,
        "CLUSTER": tiling.cluster,
        "SEGMENTS": tiling.segments,
        "DEPTH": tiling.depth,
    }


def dequantize(weight: FragmentWeight, bit_width: int) -> Tensor:
    """The weight at `bit_width`: bfloat16 [out, in]."""
    out = torch.empty(weight.out_features, weight.in_features, dtype=torch.bfloat16, device=weight.device)
    constants = _constants(bit_width, weight.group_size, next(iter(weight.parts.values())).dtype)
    kernel = load_kernel("dequantize", "nested_dequantize", defined(**constants))
    arguments: list[Argument] = [
        _describe(weight, bit_width),
        *pointers(out),
        *integers(weight.out_features, weight.in_features, weight.row_tiles, weight.column_tiles),
    ]
    grid = (weight.column_tiles, -(-weight.row_tiles // _DEQUANTIZE_WARPS), 1)
    kernel.launch(grid, 32 * _DEQUANTIZE_WARPS, arguments)
    return out


def embedding(token_ids: Tensor, weight: FragmentWeight, bit_width: int) -> Tensor:
    """Rows of a packed table: int64 [tokens] -> float32 [tokens, in]; reads only those rows."""
    ids = token_ids.contiguous().view(-1)
    out = torch.empty(ids.numel(), weight.in_features, device=weight.device)
    if ids.numel():
        constants = _constants(bit_width, weight.group_size, weight.parts[bit_width].dtype)
        kernel = load_kernel("embedding", "nested_embedding", defined(**constants))
        arguments: list[Argument] = [
            _describe(weight, bit_width),
            *pointers(ids, out),
            *integers(weight.in_features, weight.column_tiles),
        ]
        kernel.launch((ids.numel(), 1, 1), _EMBEDDING_THREADS, arguments)
    return out


def _constants(bit_width: int, group_size: int, part_dtype: torch.dtype) -> dict[str, int]:
    return {"BITS": bit_width, "GROUP": group_size, "PART": PARTS[part_dtype]}


def _describe(weight: FragmentWeight, bit_width: int) -> _Weight:
    addresses = {name: stream.data_ptr() for name, stream in weight.streams.items()}
    addresses["high"] = weight.parts[min(bit_width, layout.NIBBLE_BITS)].data_ptr()
    if bit_width > layout.NIBBLE_BITS:
        addresses["low"] = weight.parts[bit_width].data_ptr()
    return _Weight(**addresses)


def _describe_mixed(weight: FragmentWeight) -> _MixedWeight:
    parts = [weight.parts[width].data_ptr() if width in weight.parts else None for width in layout.BIT_WIDTHS]
    streams = {name: stream.data_ptr() for name, stream in weight.streams.items()}
    return _MixedWeight(**streams, parts=(ctypes.c_void_p * len(parts))(*parts))
