"""Nested linear layers in plain PyTorch: right on every device; native kernels come beside it.

Codes are unpacked to one byte a weight, a tile at a time, multiplied as integers, and scaled per group; no weight is
ever turned into a float. Integer sums are exact and the float operations that follow are elementwise, in an
order fixed by the number of groups, so a token's result cannot depend on its neighbours (ARCHITECTURE, "Same answer").
"""

import torch
from torch import Tensor

from anybit.kernels import layout
from anybit.kernels.nested import NestedWeight
from anybit.kernels.portable.fixed_point import FixedPoint

_TILE_WEIGHTS = 1 << 21  # unpacked weights alive at a time: 2 MiB
_BLOCK_SUMS = 1 << 21  # int32 partial sums alive at a time: 8 MiB


def linear(x: Tensor, weight: NestedWeight, bit_width: int) -> Tensor:
    """x Ŵ_rᵀ, each row a function of its own input alone: [tokens, in] -> [tokens, out] in x's dtype.

    x enters as fixed point numbers (`kernels.portable.fixed_point`). Oracle: `kernels.reference.linear`.
    """
    tokens = x.shape[0]
    rows = layout.padded_rows(weight.out_features)
    tile_rows = max(layout.ROW_BLOCK, _TILE_WEIGHTS // weight.in_features // layout.ROW_BLOCK * layout.ROW_BLOCK)
    block_tokens = max(1, _BLOCK_SUMS // (2 * weight.num_groups * min(tile_rows, rows)))
    activations = FixedPoint.quantize(x.to(torch.float32), weight.group_size)
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    for start in range(0, rows, tile_rows):
        stop = min(start + tile_rows, rows)
        tile = weight if stop - start == rows else weight.rows(start, stop)
        hi, lo = unpack_nibbles(tile, bit_width)
        for first in range(0, tokens, block_tokens):
            block = slice(first, min(first + block_tokens, tokens))
            out[block, start:stop] = _scaled_sum(activations, block, tile, bit_width, hi, lo)
    return out[:, : weight.out_features]


def _scaled_sum(
    activations: FixedPoint, block: slice, tile: NestedWeight, bit_width: int, hi: Tensor, lo: Tensor | None
) -> Tensor:
    """Σ over groups of step·(s·Σq·hi + t·Σq·lo + z·Σq): float32 [tokens of the block, rows of the tile].

    Every operation rounds once and elementwise, and none may be fused: the order in which the groups of an output
    element are added depends on their number alone.
    """
    part = tile.affine[bit_width]
    terms = activations.product(hi, block).mul_(_float(tile.affine[min(bit_width, layout.NIBBLE_BITS)].scale))
    if lo is not None:
        terms.add_(activations.product(lo, block).mul_(_float(part.scale)))
    terms.add_(activations.total[:, block] * _float(part.zero)).mul_(activations.step[:, block])
    # Halves onto halves, one elementwise addition at a time: a library's sum orders the last few columns of a row
    # otherwise than the rest.
    groups = terms.shape[0]
    while groups > 1:
        half = groups // 2
        terms[:half].add_(terms[groups - half : groups])
        groups -= half
    return terms[0]


def _float(per_group: Tensor) -> Tensor:
    """Float part [groups, rows] -> float32 [groups, 1, rows]."""
    return per_group.to(torch.float32).unsqueeze(1)


def embedding(token_ids: Tensor, weight: NestedWeight, bit_width: int) -> Tensor:
    """Rows of a quantized embedding: int64 [tokens] -> float32 [tokens, in]; reads only those rows."""
    shape = (token_ids.numel(), weight.num_groups, weight.group_size)

    def per_row(per_group: Tensor) -> Tensor:
        return per_group[:, token_ids].T.to(torch.float32).unsqueeze(2)

    def levels(chunks: tuple[layout.Chunk, ...]) -> Tensor:
        codes = torch.zeros(shape[0], weight.in_features, dtype=torch.uint8, device=token_ids.device)
        for chunk in chunks:
            codes = (codes << chunk.bits) | layout.gather_rows(weight.chunks[chunk.name], chunk, token_ids)
        return codes.view(shape).to(torch.float32)

    hi, lo = layout.nibble_chunks(bit_width)
    rows = levels(hi).mul_(per_row(weight.affine[min(bit_width, layout.NIBBLE_BITS)].scale))
    if lo:
        rows.add_(levels(lo).mul_(per_row(weight.affine[bit_width].scale)))
    return rows.add_(per_row(weight.affine[bit_width].zero)).view(shape[0], weight.in_features)


def unpack_nibbles(weight: NestedWeight, bit_width: int) -> tuple[Tensor, Tensor | None]:
    """The high nibble's and (above 4 bits) the low nibble's bits that `bit_width` reads: uint8 [padded rows, in] each."""
    hi, lo = layout.nibble_chunks(bit_width)
    return _codes(weight, hi), _codes(weight, lo) if lo else None


def _codes(weight: NestedWeight, chunks: tuple[layout.Chunk, ...]) -> Tensor:
    codes = layout.unpack_words(weight.chunks[chunks[0].name], chunks[0]).view(-1)
    for chunk in chunks[1:]:
        codes.bitwise_left_shift_(chunk.bits)
        codes.bitwise_or_(layout.unpack_words(weight.chunks[chunk.name], chunk).view(-1))
    return codes.view(torch.uint8).view(-1, weight.in_features)
