"""Chooses the implementation of each operation. Callers name what they want, never how it is done.

Today every device runs the portable PyTorch path; native CPU and GPU kernels will be chosen here by device and shape.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from anybit.kernels.nested import NestedWeight
from anybit.kernels.portable import attention as portable_attention
from anybit.kernels.portable import elementwise
from anybit.kernels.portable import linear as portable_linear

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": elementwise.silu, "gelu_tanh": elementwise.gelu_tanh}

WidthSegment = tuple[int, int, int]
"""Rows start .. stop−1 of a batch and the bit-width they are computed at: (bit_width, start, stop)."""


def linear(x: Tensor, weight: NestedWeight, segments: Sequence[WidthSegment]) -> Tensor:
    """x Ŵᵀ with each segment of rows at exactly its own bit-width: float32 [tokens, in] -> float32 [tokens, out].

    The segments cover the rows of x in order. A row's result depends on that row and its width alone.
    """
    if len(segments) == 1:
        return portable_linear.linear(x, weight, segments[0][0])
    return torch.cat([portable_linear.linear(x[start:stop], weight, width) for width, start, stop in segments])


def embedding(token_ids: Tensor, weight: NestedWeight, bit_width: int) -> Tensor:
    """Rows of a nested embedding table: int64 [tokens] -> float32 [tokens, in]."""
    return portable_linear.embedding(token_ids, weight, bit_width)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention over paged keys and values; shapes in `kernels.portable.attention.paged_attention`."""
    return portable_attention.paged_attention(
        q, k_pages, v_pages, block_tables, positions, scale, window=window, softcap=softcap
    )


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap·tanh(x/cap), in place."""
    return elementwise.softcap_(x, cap)
