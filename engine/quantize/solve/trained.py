"""Float parts as trainable parameters: a weight is read from fixed codes, and gradients reach its scales and zeros."""

from typing import Any

import torch
from torch import Tensor

from anybit.engine.quantize.solve.coded import FloatPart


class TrainedPart:
    """One width's float part of one linear while it is trained: Ŵ = s·(q − q̄) + m, with q̄ the middle of the codes.

    Centring makes s and m nearly independent. Both are trained as changes relative to the scales at the start.
    """

    def __init__(self, codes: Tensor, bit_width: int, part: FloatPart) -> None:
        """codes uint8 [out, in], those of this width."""
        self._codes = codes.view(*part.scale.shape, -1)
        self._centre = ((1 << bit_width) - 1) / 2
        self._scale = part.scale
        self._middle = part.zero + self._centre * part.scale
        self.changes = (
            torch.zeros_like(part.scale, requires_grad=True),
            torch.zeros_like(part.scale, requires_grad=True),
        )

    def weight(self) -> Tensor:
        """float32 [out, in], differentiable with respect to `changes`."""
        scale, middle = self._current()
        weight: Tensor = _Read.apply(self._codes, self._centre, scale, middle)  # type: ignore[no-untyped-call]
        return weight

    def part(self) -> FloatPart:
        with torch.no_grad():
            scale, middle = self._current()
            return FloatPart(scale, middle - self._centre * scale)

    def _current(self) -> tuple[Tensor, Tensor]:
        scale_change, middle_change = self.changes
        return self._scale * (1 + scale_change), self._middle + self._scale.abs() * middle_change


class _Read(torch.autograd.Function):
    """Keeps only the codes for the backward pass: a quarter of what float levels would take."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, centre: float, scale: Tensor, middle: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.centre = centre
        weight = codes.to(torch.float32)
        return weight.mul_(scale[:, :, None]).add_((middle - centre * scale)[:, :, None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor, Tensor]:
        (codes,) = ctx.saved_tensors
        grouped = gradient.view(codes.shape)
        for_middle = grouped.sum(2)
        for_scale = (codes.to(torch.float32).mul_(grouped)).sum(2) - ctx.centre * for_middle
        return None, None, for_scale, for_middle
