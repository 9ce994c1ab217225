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
        # Signed bytes become floats several times faster than unsigned ones.
        signed = (codes.to(torch.int16) - (1 << (bit_width - 1))).to(torch.int8)
        self._codes = signed.view(*part.scale.shape, -1)
        self._centre = ((1 << bit_width) - 1) / 2
        self._scale = part.scale
        self._middle = part.zero + self._centre * part.scale
        self.changes = (
            torch.zeros_like(part.scale, requires_grad=True),
            torch.zeros_like(part.scale, requires_grad=True),
        )

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in], differentiable with respect to `changes`."""
        weight: Tensor = _Read.apply(  # type: ignore[no-untyped-call]
            self._codes, self._scale, self._middle, *self.changes, dtype
        )
        return weight

    def part(self) -> FloatPart:
        with torch.no_grad():
            scale, middle = _changed(self._scale, self._middle, *self.changes)
            return FloatPart(scale, middle - self._centre * scale)


def _changed(scale: Tensor, middle: Tensor, scale_change: Tensor, middle_change: Tensor) -> tuple[Tensor, Tensor]:
    return scale * (1 + scale_change), middle + scale.abs() * middle_change


class _Read(torch.autograd.Function):
    """Levels of signed codes, whose middle is −½. Keeps only the codes for the backward pass: a quarter of the levels."""

    @staticmethod
    def forward(
        ctx: Any,
        codes: Tensor,
        scale: Tensor,
        middle: Tensor,
        scale_change: Tensor,
        middle_change: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        now, middle = _changed(scale, middle, scale_change, middle_change)
        levels = codes.to(torch.float32).mul_(now[:, :, None])
        return levels.add_((middle + now / 2)[:, :, None]).flatten(1).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, Tensor, Tensor, None]:
        codes, scale = ctx.saved_tensors
        grouped = gradient.to(torch.float32).view(codes.shape)
        for_middle = grouped.sum(2)
        for_scale = codes.to(torch.float32).mul_(grouped).sum(2).add_(for_middle, alpha=0.5)
        return None, None, None, for_scale.mul_(scale), for_middle.mul_(scale.abs()), None
