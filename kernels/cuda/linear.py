"""Nested linear layers and embeddings on an NVIDIA GPU, through the tensor cores' integer instructions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybit.kernels.cuda.activations import (
    MAX_TOKEN_TILES,
    Activations,
    InputForm,
    num_token_tiles,
    prepare_activations,
)
from anybit.kernels.cuda.driver import (
    Argument,
    can_launch,
    defined,
    has_warpgroups,
    integers,
    load_kernel,
    pointers,
)
from anybit.kernels.cuda.fragments import TILE_TOKENS, FragmentWeight
from anybit.kernels.cuda.operands import describe_mixed_weight, describe_weight, weight_constants
from anybit.kernels.cuda.tuning import FEW_ROWS, Tiling, choose_tiling
from anybit.kernels.cuda.values import PARTS, VALUES
from anybit.kernels.cuda.warpgroup_linear import multiply_batch, multiply_values
from anybit.kernels.cuda.warpgroup_tuning import num_parts
from anybit.kernels.nested import NestedWeight
from anybit.kernels.widths import MIXED_ROWS, RowWidths, WidthSegment

ACTIVATION_ERROR = 1 / 32638
"""Largest error of an activation as a share of its group's largest magnitude."""
_EMBEDDING_THREADS = 256
_DEQUANTIZE_WARPS = 4
FEW_TOKENS = 16
"""Up to so many, tensor cores wait for memory whatever the kernel."""
_SMALL_WEIGHT = 1 << 24  # up to so many numbers, more tokens are few
_MANY_TOKENS = 256  # from which warpgroups pay for any weight, and the library for any form
_MAX_VALUES_TILES = 32
_MIXED_PASS_TILES, _FEW_PARTS = (2, 4, 8, 12, 16), 3


def can_pack(weight: NestedWeight) -> bool:
    """Whether the GPU's kernels can be built here and know this weight's number types."""
    part = next(iter(weight.affine.values())).scale
    return part.dtype in PARTS and can_launch(part.device)


def linear(
    x: Tensor,
    weight: FragmentWeight,
    segments: Sequence[WidthSegment],
    bias: Tensor | None = None,
    is_fast: bool = False,
) -> Tensor:
    """x Ŵᵀ (+ bias), each segment (bit_width, start, stop) of rows at its width: [tokens, in] -> [tokens, out] in x's dtype.

    A row's result depends on that row and its width alone, unless `is_fast` lets a segment's length decide how it is
    multiplied (bfloat16 only).
    """
    absent = [width for width, _, _ in segments if width not in weight.bit_widths]
    if absent:
        raise ValueError(f"The weight was not loaded at {absent[0]} bits.")
    x = x.contiguous()
    y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    choose = fast_form if is_fast and x.dtype == torch.bfloat16 else exact_form
    for width, start, stop in segments:
        if stop > start:
            form = choose(stop - start, weight)
            if form is None:
                multiply_dequantized(x[start:stop], weight, width, bias, y[start:stop])
            else:
                multiply(prepare_activations(x[start:stop], form), weight, width, bias, y[start:stop])
    return y


def exact_form(tokens: int, weight: FragmentWeight) -> InputForm:
    """Fixed point numbers, for the faster of the kernels that agree bit for bit."""
    group_size = weight.group_size
    if not has_warpgroups(weight.device) or tokens <= FEW_TOKENS:
        return InputForm(group_size)
    # Warpgroups need many tokens, or rows, to pay.
    if tokens < _MANY_TOKENS and weight.out_features <= FEW_ROWS:
        return InputForm(group_size)
    return InputForm(group_size, min(num_token_tiles(tokens), 2 * MAX_TOKEN_TILES))


def fast_form(tokens: int, weight: FragmentWeight) -> InputForm | None:
    """As `exact_form` for few tokens, then what is fastest, in another order: values, or None for the library."""
    few = 2 * FEW_TOKENS if weight.out_features * weight.in_features <= _SMALL_WEIGHT else FEW_TOKENS
    if tokens <= few:
        return InputForm(weight.group_size)
    if not has_warpgroups(weight.device):
        return exact_form(tokens, weight) if tokens < _MANY_TOKENS // 2 else None
    if tokens >= _MANY_TOKENS:
        return None
    return InputForm(weight.group_size, values_tiles(tokens), is_values=True)


def mixed_form(tokens: int, weight: FragmentWeight, widths: RowWidths, is_fast: bool) -> InputForm:
    """As `exact_form` or, with `is_fast`, `fast_form` for rows of several widths."""
    if not (is_fast and has_warpgroups(weight.device)):
        return InputForm(weight.group_size)
    # Each part has sums of its own in registers.
    most = _MIXED_PASS_TILES[-1] // (1 if num_parts(widths.present) <= _FEW_PARTS else 2)
    token_tiles = -(-tokens // TILE_TOKENS)
    passes = -(-token_tiles // most)
    pass_tiles = next(tiles for tiles in _MIXED_PASS_TILES if tiles * passes >= token_tiles)
    return InputForm(weight.group_size, pass_tiles, is_values=True, has_sums=True)


def mixed_alignment(counts: Sequence[int], device: torch.device, is_fast: bool) -> int:
    """At what multiples rows of a width begin, of which there are so many of each (`RowWidths`)."""
    if is_fast and has_warpgroups(device):
        return 1
    few = sum(count + -count % TILE_TOKENS for count in counts) <= MIXED_ROWS
    return TILE_TOKENS if few else MIXED_ROWS


def values_tiles(tokens: int) -> int:
    """N-tiles of a pass of 8, 16, 32, 64 or 128 tokens."""
    return next((tiles for tiles in (2, 4, 8, 16) if tokens <= tiles * TILE_TOKENS), _MAX_VALUES_TILES)


def multiply(activations: Activations, weight: FragmentWeight, bit_width: int, bias: Tensor | None, y: Tensor) -> None:
    """Write the product at `bit_width` to y [tokens, out]; bias float32 [out]."""
    if activations.form.is_values:
        multiply_values(activations, weight, bit_width, bias, y)
    elif activations.form.pass_tiles > 1:
        multiply_batch(activations, weight, bit_width, bias, y)
    else:
        multiply_few(activations, weight, bit_width, bias, y)


def multiply_dequantized(x: Tensor, weight: FragmentWeight, bit_width: int, bias: Tensor | None, y: Tensor) -> None:
    """`multiply` by the library, of bfloat16 [tokens, in] with the weight in bfloat16."""
    torch.mm(x, dequantize(weight, bit_width).T, out=y)
    if bias is not None:
        y += bias


def multiply_mixed(
    activations: Activations, weight: FragmentWeight, widths: RowWidths, bias: Tensor | None, y: Tensor
) -> None:
    """`multiply` with each row at its own width. Few rows, and values, read the weight once, at the widest of them.

    Of fixed point numbers a row is bit for bit what it is alone; of values, what it is among any others in as many passes.
    """
    if activations.form.is_values:
        multiply_values(activations, weight, max(widths.present), bias, y, widths=widths)
    elif activations.tokens <= MIXED_ROWS:
        multiply_few(activations, weight, max(widths.present), bias, y, widths=widths)
    else:
        for width in widths.present:
            multiply_few(activations, weight, width, bias, y, widths=RowWidths((width,), widths.of_rows))


def multiply_few(
    activations: Activations,
    weight: FragmentWeight,
    bit_width: int,
    bias: Tensor | None,
    y: Tensor,
    tiling: Tiling | None = None,
    widths: RowWidths | None = None,
) -> None:
    """Of fixed point numbers in passes of one n-tile; with `widths`, each n-tile at its own, `bit_width` the widest.

    With a single one of `widths`, passes of other widths are left alone. `tiling` None takes the best known one.
    """
    token_tiles = min(activations.passes, MAX_TOKEN_TILES if widths is None else MIXED_ROWS // TILE_TOKENS)
    tiling = tiling or choose_tiling(weight.out_features, weight.in_features, bit_width, token_tiles)
    shared_bytes = tiling.shared_bytes(token_tiles)
    constants = product_constants(tiling, bit_width, weight.group_size, weight.part_dtype, y.dtype, token_tiles)
    served = describe_weight(weight, bit_width)
    if widths is not None and len(widths.present) > 1:
        served = describe_mixed_weight(weight)
        constants["WIDTHS"] = sum(1 << width for width in widths.present)
    elif widths is not None:
        constants["OWN_PASSES"] = 1
    kernel = load_kernel("linear_decode", "nested_linear_decode", defined(**constants), shared_bytes)
    arguments: list[Argument] = [
        served,
        *pointers(None if widths is None else widths.of_rows),
        *activations.addresses,
        *pointers(bias, y),
        *integers(activations.tokens, activations.slots, weight.out_features, weight.row_tiles, weight.column_tiles),
    ]
    passes = activations.passes // token_tiles
    blocks = -(-weight.row_tiles // (tiling.row_warps * tiling.row_tiles))
    kernel.launch((tiling.cluster, passes, blocks), tiling.threads, arguments, shared_bytes)


def product_constants(
    tiling: Tiling, bit_width: int, group_size: int, part_dtype: torch.dtype, dtype: torch.dtype, token_tiles: int
) -> dict[str, int]:
    """What `source/linear_decode.cu` is compiled for."""
    return {
        **weight_constants(bit_width, group_size, part_dtype),
        "VALUE": VALUES[dtype],
        "TOKEN_TILES": token_tiles,
        "ROW_TILES": tiling.row_tiles,
        "ROW_WARPS": tiling.row_warps,
        "COLUMN_WARPS": tiling.column_warps,
        "CLUSTER": tiling.cluster,
        "SEGMENTS": tiling.segments,
        "DEPTH": tiling.depth,
        "MIN_BLOCKS": tiling.min_blocks,
    }


def dequantize(weight: FragmentWeight, bit_width: int) -> Tensor:
    """The weight at `bit_width`: bfloat16 [out, in]."""
    out = torch.empty(weight.out_features, weight.in_features, dtype=torch.bfloat16, device=weight.device)
    constants = weight_constants(bit_width, weight.group_size, weight.part_dtype)
    kernel = load_kernel("dequantize", "nested_dequantize", defined(**constants))
    arguments: list[Argument] = [
        describe_weight(weight, bit_width),
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
        constants = weight_constants(bit_width, weight.group_size, weight.part_dtype)
        kernel = load_kernel("embedding", "nested_embedding", defined(**constants))
        arguments: list[Argument] = [
            describe_weight(weight, bit_width),
            *pointers(ids, out),
            *integers(weight.in_features, weight.column_tiles),
        ]
        kernel.launch((ids.numel(), 1, 1), _EMBEDDING_THREADS, arguments)
    return out
