"""The published MatQuant slice as a baseline: round and clamp, with one scale and zero for all widths.

arXiv 2502.06786: an 8-bit min-max code q = clamp(round(w/α + z), 0, 255), α = (max − min)/255, z = −min/α, read at r
bits as α·(S(q, r) − z). No float part per width takes up the shift and the wide top bucket of the slice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybit.engine.layers.embedding import DenseVocabulary
from anybit.engine.layers.linear import DenseLinear
from anybit.engine.weights.loader import DenseLoader
from anybit.kernels import layout
from anybit.kernels.reference import matquant_slice


def sliced_weight(weight: Tensor, group_size: int, bit_width: int) -> Tensor:
    """What the published slice makes of a weight at `bit_width`: float32 [out, in] -> float32 [out, in]."""
    groups = weight.to(torch.float32).view(weight.shape[0], -1, group_size)
    low, high = groups.aminmax(dim=2, keepdim=True)
    alpha = (high - low) / 255
    alpha = torch.where(alpha > 0, alpha, 1.0)
    codes = ((groups - low) / alpha).round_().clamp_(0, 255).to(torch.uint8)
    return (alpha * matquant_slice(codes, bit_width).float() + low).view(weight.shape)


class MatQuantSliceLoader:
    """Loads a source model as the published slice at one width; embedding and head at `lm_head_bits`, as we serve."""

    def __init__(self, source: DenseLoader, group_size: int | None, bit_width: int, lm_head_bits: int) -> None:
        self._source = source
        self._group_size = group_size
        self._bit_width = bit_width
        self._lm_head_bits = lm_head_bits

    def linear(self, prefixes: Sequence[str], bias: bool) -> DenseLinear:
        dense = self._source.linear(prefixes, bias)
        return DenseLinear(self._slice(dense.weight, self._bit_width), dense.bias)

    def vocabulary(self, prefix: str) -> DenseVocabulary:
        return DenseVocabulary(self._slice(self._source.vocabulary(prefix).weight, self._lm_head_bits))

    def vector(self, name: str) -> Tensor:
        return self._source.vector(name)

    def _slice(self, weight: Tensor, bit_width: int) -> Tensor:
        return sliced_weight(weight, self._group_size or layout.auto_group_size(weight.shape[1]), bit_width)
