"""Activations as fixed point numbers, so that products with integer codes are exact.

A float sum depends on its order, and the order that a BLAS library picks depends on how many rows it is given. An
integer sum does not. Each (token, group) of activations is therefore written as x ≈ step·q with |q| ≤ 8127: the error
is below step/2 = 6.2e-5 of the group's largest magnitude, a tenth of what bfloat16 rounding costs. Products of q with
4-bit codes, summed over a group, stay below 2^24 (8127·15·128 = 15.6 million): exact in int32 and in float32 alike.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.kernels import fallbacks

_DIGIT_BASE = 128  # q = 128·d1 + d0 with |d1|, |d0| ≤ 64: digits small enough that no int8 kernel can saturate
_LARGEST = 63 * _DIGIT_BASE + 63
_MAX_CODE = 15
ACTIVATION_ERROR = 1 / (2 * _LARGEST)
"""Largest error of an activation as a share of its group's largest magnitude."""


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """Activations [tokens, in] as step·(128·d1 + d0) per (token, group)."""

    digits: Tensor  # int8 [groups, 2, tokens, group_size]: d1, then d0
    step: Tensor  # float32 [groups, tokens, 1]
    total: Tensor  # float32 [groups, tokens, 1]: the sum of q over the group, exact

    @staticmethod
    def quantize(x: Tensor, group_size: int) -> "FixedPoint":
        """Nearest fixed point numbers of x, float32 [tokens, in]. A NaN or infinite input makes its step NaN or infinite."""
        grouped = x.view(x.shape[0], x.shape[1] // group_size, group_size)
        step = grouped.abs().amax(2, keepdim=True).div_(_LARGEST)
        q = grouped.div(step.clamp(min=torch.finfo(torch.float32).tiny)).round_()
        high = q.mul(1 / _DIGIT_BASE).round_()
        low = q.sub(high, alpha=_DIGIT_BASE)
        digits = torch.stack((high, low)).to(torch.int8).permute(2, 0, 1, 3)
        return FixedPoint(digits, step.transpose(0, 1), q.sum(2, keepdim=True).transpose(0, 1))

    def product(self, codes: Tensor, tokens: slice) -> Tensor:
        """Σ q·code over each group, exact: codes uint8 [rows, in] with values 0 .. 15 -> float32 [groups, tokens, rows]."""
        digits = self.digits[:, :, tokens]
        groups, _, num_tokens, group_size = digits.shape
        rows = codes.shape[0]
        if not _int8_products_are_exact(codes.device, group_size):
            fallbacks.record("fixed_point_product", "no exact int8 matrix product here, so float32 does the same sums")
            return self._float_product(codes, digits)
        stacked = digits.reshape(groups, 2 * num_tokens, group_size)
        if codes.is_cuda:
            # cuBLAS wants more than 16 rows, and a multiple of 8.
            stacked = F.pad(stacked, (0, 0, 0, max(24, -(-2 * num_tokens // 8) * 8) - 2 * num_tokens))
        sums = torch.empty(groups, stacked.shape[1], rows, dtype=torch.int32, device=codes.device)
        columns = codes.view(torch.int8).view(rows, groups, group_size).permute(1, 2, 0)
        for left, right, out in zip(stacked.unbind(0), columns.unbind(0), sums.unbind(0), strict=True):
            torch._int_mm(left, right, out=out)
        high = sums[:, :num_tokens]
        return high.mul_(_DIGIT_BASE).add_(sums[:, num_tokens : 2 * num_tokens]).to(torch.float32)

    def _float_product(self, codes: Tensor, digits: Tensor) -> Tensor:
        q = digits[:, 0].float().mul_(_DIGIT_BASE).add_(digits[:, 1])
        columns = codes.view(codes.shape[0], digits.shape[0], -1).permute(1, 2, 0).float()
        return torch.bmm(q, columns)


@functools.cache
def _int8_products_are_exact(device: torch.device, group_size: int) -> bool:
    """Whether this build multiplies int8 matrices without overflow; some do not on processors without int8 dot products."""
    digits = torch.full((32, group_size), -_DIGIT_BASE // 2, dtype=torch.int8, device=device)
    digits[1::2] = _DIGIT_BASE // 2 - 1
    codes = torch.full((64, group_size), _MAX_CODE, dtype=torch.int8, device=device)
    try:
        sums = torch._int_mm(digits, codes.T)
    except (RuntimeError, NotImplementedError):  # PyTorch builds without the operation say so in either way
        return False
    return torch.equal(sums.double(), digits.double() @ codes.double().T)
