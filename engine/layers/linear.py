"""Linear layers behind one call: from nested codes while serving, from floats as the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from anybit.kernels import dispatch
from anybit.kernels.dispatch import ServedWeight
from anybit.kernels.widths import WidthSegment


class Linear(Protocol):
    """y = x Wᵀ (+ bias), [tokens, in] -> [tokens, out], each segment of rows at its own bit-width."""

    def __call__(self, x: Tensor, segments: Sequence[WidthSegment]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class NestedLinear:
    weight: ServedWeight
    bias: Tensor | None = None

    def __call__(self, x: Tensor, segments: Sequence[WidthSegment]) -> Tensor:
        return dispatch.linear(x, self.weight, segments, self.bias)


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """Unquantized weights [out, in]; widths are ignored. For evaluation and tests, never for serving."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, segments: Sequence[WidthSegment]) -> Tensor:
        del segments
        return F.linear(x, self.weight, self.bias)
