"""Products of many tokens on Hopper's warpgroups: in fixed point with the bits of few tokens' products, or of values."""

import ctypes
import functools

import torch
from torch import Tensor

from anybit.kernels.cuda.activations import Activations
from anybit.kernels.cuda.driver import Argument, defined, integers, load_kernel, pointers
from anybit.kernels.cuda.fragments import FragmentWeight
from anybit.kernels.cuda.operands import describe_mixed_weight, describe_weight, weight_constants
from anybit.kernels.cuda.values import VALUES
from anybit.kernels.cuda.warpgroup_tuning import (
    BatchTiling,
    RingOperands,
    ValuesTiling,
    WarpgroupTiling,
    default_batch_tiling,
    default_values_tiling,
    divide,
    limits,
    num_blocks,
    num_threads,
)
from anybit.kernels.widths import RowWidths


class _DivisionArgument(ctypes.Structure):
    """`Division` of `source/linear_values.cu`."""

    _fields_ = [(name, ctypes.c_int) for name in ("passes", "rounds", "splits", "cut_blocks")]


def multiply_batch(
    activations: Activations,
    weight: FragmentWeight,
    bit_width: int,
    bias: Tensor | None,
    y: Tensor,
    tiling: BatchTiling | None = None,
) -> None:
    """Of fixed point numbers, in `linear_decode.cu`'s order of sums. y [tokens, out]; bias float32 [out]."""
    operands = _operands(activations, weight, (bit_width,))
    shape = (weight.out_features, weight.in_features)
    tiling = tiling or default_batch_tiling(*shape, activations.passes, operands, limits())
    constants = batch_constants(tiling, operands, weight.part_dtype, y.dtype)
    arguments: list[Argument] = [
        describe_weight(weight, bit_width),
        *activations.addresses,
        *pointers(bias, y),
        *integers(activations.tokens, activations.slots, weight.out_features, weight.row_tiles, weight.column_tiles),
    ]
    grid = (tiling.cluster, activations.passes, num_blocks(weight.out_features, tiling))
    _launch("linear_batch", constants, tiling, operands, grid, arguments)


def multiply_values(
    activations: Activations,
    weight: FragmentWeight,
    bit_width: int,
    bias: Tensor | None,
    y: Tensor,
    tiling: ValuesTiling | None = None,
    widths: RowWidths | None = None,
) -> None:
    """Of values of y's type, float16 or bfloat16. y [tokens, out]; bias float32 [out].

    The weight is rounded to that type; with `widths`, each n-tile at its own, of which `bit_width` is the widest, codes are
    multiplied as they are (and activations have sums).
    """
    operands = _operands(activations, weight, (bit_width,) if widths is None else widths.present)
    shape = (weight.out_features, weight.in_features)
    tiling = tiling or default_values_tiling(*shape, activations.passes, operands, limits())
    division = divide(num_blocks(weight.out_features, tiling) * activations.passes, weight.column_tiles, limits())
    partial = torch.empty(division.partial_numbers(tiling, operands.pass_tokens), device=y.device)
    constants = values_constants(tiling, operands, weight.part_dtype, y.dtype)
    arguments: list[Argument] = [
        describe_weight(weight, bit_width) if widths is None else describe_mixed_weight(weight),
        *pointers(None if widths is None else widths.of_rows),
        *activations.addresses,
        *pointers(bias, y, partial, _piece_counters(y.device)),
        *integers(activations.tokens, activations.slots, weight.out_features, weight.row_tiles, weight.column_tiles),
        _DivisionArgument(activations.passes, division.rounds, division.splits, division.cut_blocks),
    ]
    _launch("linear_values", constants, tiling, operands, (division.grid, 1, 1), arguments)


@functools.cache
def _piece_counters(device: torch.device) -> Tensor:
    """Zeros, which every launch leaves as it found them; launches that share a device's follow one another."""
    return torch.zeros(limits().multiprocessors, dtype=torch.int32, device=device)


def batch_constants(
    tiling: BatchTiling, operands: RingOperands, part_dtype: torch.dtype, dtype: torch.dtype
) -> dict[str, int]:
    """What `source/linear_batch.cu` is compiled for."""
    constants = _ring_constants(tiling, operands, part_dtype, dtype)
    return {**constants, "CLUSTER": tiling.cluster, "SEGMENTS": tiling.segments}


def values_constants(
    tiling: ValuesTiling, operands: RingOperands, part_dtype: torch.dtype, dtype: torch.dtype
) -> dict[str, int]:
    """What `source/linear_values.cu` is compiled for: one width, or several where inputs have sums."""
    constants = _ring_constants(tiling, operands, part_dtype, dtype)
    if operands.has_sums:
        constants["WIDTHS"] = sum(1 << width for width in operands.widths)
    return constants


def _ring_constants(
    tiling: WarpgroupTiling, operands: RingOperands, part_dtype: torch.dtype, dtype: torch.dtype
) -> dict[str, int]:
    """What all of `source/ring.cuh` is compiled for."""
    return {
        **weight_constants(operands.bit_width, operands.group_size, part_dtype),
        "VALUE": VALUES[dtype],
        "PASS_TILES": operands.pass_tiles,
        "WARPGROUPS": tiling.warpgroups,
        "STAGES": tiling.stages,
    }


def _operands(activations: Activations, weight: FragmentWeight, widths: tuple[int, ...]) -> RingOperands:
    form = activations.form
    return RingOperands(widths, weight.group_size, weight.part_dtype.itemsize, form.pass_tiles, form.has_sums)


def _launch(
    source: str,
    constants: dict[str, int],
    tiling: WarpgroupTiling,
    operands: RingOperands,
    grid: tuple[int, int, int],
    arguments: list[Argument],
) -> None:
    shared_bytes = tiling.shared_bytes(operands)
    kernel = load_kernel(source, f"nested_{source}", defined(**constants), shared_bytes)
    kernel.launch(grid, num_threads(tiling), arguments, shared_bytes)
