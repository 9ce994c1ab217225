"""Linear layers behind one call: from nested codes while serving, from floats as the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from anybit.kernels import dispatch
from anybit.kernels.dispatch import WidthSegment
from anybit.kernels.nested import NestedWeight


class Linear(Protocol):
    """y = x Wᵀ (+ bias), [tokens, in] -> [tokens, out], each segment of rows at its own bit-width."""

    def __call__(self, x: Tensor, segments: Sequence[WidthSegment]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class NestedLinear:
    weight: NestedWeight
    bias: Tensor | None = None

    def __call__(self, x: Tensor, segments: Sequence[WidthSegment]) -> Tensor:
        y = dispatch.linear(x, self.weight, segments)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """Unquantized weights [out, in]; widths are ignored. For evaluation and tests, never for serving."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, segments: Sequence[WidthSegment]) -> Tensor:
        del segments
        return F.linear(x, self.weight, self.bias)
