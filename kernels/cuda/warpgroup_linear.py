"""Products of many tokens on Hopper's warpgroups: in fixed point with the bits of few tokens' products, or of values."""

import torch
from torch import Tensor

from anybit.kernels.cuda.activations import Activations
from anybit.kernels.cuda.driver import Argument, defined, integers, load_kernel, pointers
from anybit.kernels.cuda.fragments import FragmentWeight
from anybit.kernels.cuda.operands import describe_weight, weight_constants
from anybit.kernels.cuda.values import VALUES
from anybit.kernels.cuda.warpgroup_tuning import (
    BatchTiling,
    RingOperands,
    ValuesTiling,
    WarpgroupTiling,
    default_batch_tiling,
    default_values_tiling,
    limits,
    num_blocks,
    num_threads,
)


def multiply_batch(
    activations: Activations,
    weight: FragmentWeight,
    bit_width: int,
    bias: Tensor | None,
    y: Tensor,
    tiling: BatchTiling | None = None,
) -> None:
    """Of fixed point numbers, in `linear_decode.cu`'s order of sums. y [tokens, out]; bias float32 [out]."""
    operands = _operands(activations, weight, bit_width)
    shape = (weight.out_features, weight.in_features)
    tiling = tiling or default_batch_tiling(*shape, activations.passes, operands, limits())
    constants = batch_constants(tiling, operands, weight.part_dtype, y.dtype)
    arguments: list[Argument] = [
        describe_weight(weight, bit_width),
        *activations.addresses,
        *pointers(bias, y),
        *integers(activations.tokens, activations.slots, weight.out_features, weight.row_tiles, weight.column_tiles),
    ]
    _launch("linear_batch", constants, tiling, operands, activations, weight, arguments)


def multiply_values(
    activations: Activations,
    weight: FragmentWeight,
    bit_width: int,
    bias: Tensor | None,
    y: Tensor,
    tiling: ValuesTiling | None = None,
) -> None:
    """Of values, with the weight rounded to y's type, float16 or bfloat16. y [tokens, out]; bias float32 [out]."""
    operands = _operands(activations, weight, bit_width)
    shape = (weight.out_features, weight.in_features)
    tiling = tiling or default_values_tiling(*shape, activations.passes, operands, limits())
    constants = values_constants(tiling, operands, weight.part_dtype, y.dtype)
    arguments: list[Argument] = [
        describe_weight(weight, bit_width),
        *pointers(activations.numbers, bias, y),
        *integers(activations.tokens, weight.out_features, weight.row_tiles, weight.column_tiles),
    ]
    _launch("linear_values", constants, tiling, operands, activations, weight, arguments)


def batch_constants(
    tiling: BatchTiling, operands: RingOperands, part_dtype: torch.dtype, dtype: torch.dtype
) -> dict[str, int]:
    """What `source/linear_batch.cu` is compiled for."""
    return {**values_constants(tiling, operands, part_dtype, dtype), "SEGMENTS": tiling.segments}


def values_constants(
    tiling: WarpgroupTiling, operands: RingOperands, part_dtype: torch.dtype, dtype: torch.dtype
) -> dict[str, int]:
    """What `source/linear_values.cu`, and all of `source/ring.cuh`, is compiled for."""
    return {
        **weight_constants(operands.bit_width, operands.group_size, part_dtype),
        "VALUE": VALUES[dtype],
        "PASS_TILES": operands.pass_tiles,
        "WARPGROUPS": tiling.warpgroups,
        "CLUSTER": tiling.cluster,
        "STAGES": tiling.stages,
    }


def _operands(activations: Activations, weight: FragmentWeight, bit_width: int) -> RingOperands:
    return RingOperands(bit_width, weight.group_size, weight.part_dtype.itemsize, activations.form.pass_tiles)


def _launch(
    source: str,
    constants: dict[str, int],
    tiling: WarpgroupTiling,
    operands: RingOperands,
    activations: Activations,
    weight: FragmentWeight,
    arguments: list[Argument],
) -> None:
    shared_bytes = tiling.shared_bytes(operands)
    kernel = load_kernel(source, f"nested_{source}", defined(**constants), shared_bytes)
    grid = (tiling.cluster, activations.passes, num_blocks(weight.out_features, tiling))
    kernel.launch(grid, num_threads(tiling), arguments, shared_bytes)
