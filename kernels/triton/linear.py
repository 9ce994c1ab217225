"""Nested linear layers in Triton, from the canonical order: for GPUs on which `kernels.cuda` cannot be built.

Fixed point activations times integer codes are exact, and groups are added one after the other, so that a row's result
does not depend on the rows or tiles beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anybit.kernels import layout
from anybit.kernels.nested import NestedWeight
from anybit.kernels.portable.fixed_point import FixedPoint

_BLOCK_TOKENS = 16
_BLOCK_ROWS = 32


@triton.jit  # type: ignore[untyped-decorator]
def _field(stream, row, column, columns, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits that a chunk stream holds of the codes at [row, column]."""
    codes_of_byte: tl.constexpr = 8 // BITS
    packed = tl.load(stream + (row // codes_of_byte) * columns + column).to(tl.int32)
    return (packed >> (8 - BITS * (row % codes_of_byte + 1))) & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _linear_kernel(  # type: ignore[no-untyped-def]
    digits,  # int8 [groups, 2, tokens, GROUP]
    step,  # [groups, tokens]
    total,
    c2,
    c3,
    c4,
    c6,
    c8,
    scale,  # of the high nibble, [groups, padded rows]
    low_scale,
    zero,
    out,  # float32 [tokens, rows]
    tokens,
    rows,
    padded_rows,
    columns,
    BIT_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_group = tl.arange(0, GROUP)
    has_token = token < tokens
    stored = tl.minimum(row, padded_rows - 1)
    sums = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], dtype=tl.float32)
    for group in range(columns // GROUP):
        column = (group * GROUP + in_group)[:, None]  # codes are read as [GROUP, rows]
        high = _field(c2, stored[None, :], column, columns, 2)
        if BIT_WIDTH >= 3:
            high = high * 2 + _field(c3, stored[None, :], column, columns, 1)
        if BIT_WIDTH >= 4:
            high = high * 2 + _field(c4, stored[None, :], column, columns, 1)
        first = ((group * 2) * tokens + token[:, None]) * GROUP + in_group[None, :]
        d1 = tl.load(digits + first, mask=has_token[:, None], other=0)
        d0 = tl.load(digits + first + tokens * GROUP, mask=has_token[:, None], other=0)
        codes = high.to(tl.int8)
        product = tl.dot(d1, codes, out_dtype=tl.int32) * 128 + tl.dot(d0, codes, out_dtype=tl.int32)
        part = group * padded_rows + stored
        terms = product.to(tl.float32) * tl.load(scale + part).to(tl.float32)[None, :]
        if BIT_WIDTH > 4:
            low = _field(c6, stored[None, :], column, columns, 2)
            if BIT_WIDTH == 8:
                low = low * 4 + _field(c8, stored[None, :], column, columns, 2)
            codes = low.to(tl.int8)
            product = tl.dot(d1, codes, out_dtype=tl.int32) * 128 + tl.dot(d0, codes, out_dtype=tl.int32)
            terms += product.to(tl.float32) * tl.load(low_scale + part).to(tl.float32)[None, :]
        of_token = group * tokens + token
        terms += (
            tl.load(total + of_token, mask=has_token, other=0.0)[:, None] * tl.load(zero + part).to(tl.float32)[None, :]
        )
        sums += terms * tl.load(step + of_token, mask=has_token, other=0.0)[:, None]
    place = token[:, None] * rows + row[None, :]
    tl.store(out + place, sums, mask=has_token[:, None] & (row[None, :] < rows))


def linear(x: Tensor, weight: NestedWeight, bit_width: int) -> Tensor:
    """As `portable.linear.linear`: [tokens, in] -> [tokens, out] in x's dtype. Oracle: `kernels.reference.linear`."""
    activations = FixedPoint.quantize(x.to(torch.float32), weight.group_size)
    tokens = x.shape[0]
    out = torch.empty(tokens, weight.out_features, device=x.device)
    first = weight.chunks["c2"]
    streams = [
        weight.chunks.get(chunk.name, first) for chunk in layout.CHUNKS
    ]  # what a width does not read is not read
    part = weight.affine[bit_width]
    grid = (triton.cdiv(tokens, _BLOCK_TOKENS), triton.cdiv(weight.out_features, _BLOCK_ROWS))
    _linear_kernel[grid](
        activations.digits.contiguous(),
        activations.step.contiguous(),
        activations.total.contiguous(),
        *streams,
        weight.affine[min(bit_width, layout.NIBBLE_BITS)].scale.contiguous(),
        part.scale.contiguous(),
        part.zero.contiguous(),
        out,
        tokens,
        weight.out_features,
        part.scale.shape[1],
        weight.in_features,
        BIT_WIDTH=bit_width,
        GROUP=weight.group_size,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        BLOCK_ROWS=_BLOCK_ROWS,
    )
    return out.to(x.dtype)
