"""Numbers that describe a page, in a byte each, with their range in two half-precision numbers a page."""

import torch
from torch import Tensor

_LINEAR_STEPS = 255
_LOG_STEPS = 254  # code 0 is zero itself


def encode_linear(values: Tensor) -> tuple[Tensor, Tensor]:
    """Evenly spaced levels from the least to the largest value of a page.

    values float32 [..., n] -> codes uint8 [..., n] and range float16 [..., 2]: the lowest level and the step.
    """
    low, high = values.aminmax(dim=-1)
    low = low.to(torch.float16)
    step = ((high - low.float()) / _LINEAR_STEPS).to(torch.float16)
    codes = ((values - low.float()[..., None]) / _divisor(step)[..., None]).round_().clamp_(0, _LINEAR_STEPS)
    return codes.to(torch.uint8), torch.stack((low, step), dim=-1)


def decode_linear(codes: Tensor, page_range: Tensor) -> Tensor:
    """Inverse of `encode_linear` up to rounding: float32 [..., n]."""
    low, step = page_range.to(torch.float32).unbind(-1)
    return low[..., None] + step[..., None] * codes.to(torch.float32)


def encode_log(values: Tensor) -> tuple[Tensor, Tensor]:
    """Levels whose logarithms are evenly spaced, and zero.

    values float32 [..., n], none negative -> codes uint8 [..., n] and range float16 [..., 2]: log₂ of the lowest level
    but zero, and the step.
    """
    positive = values > 0
    logs = torch.log2(torch.where(positive, values, 1.0))
    low = torch.where(positive, logs, torch.inf).amin(-1)
    high = torch.where(positive, logs, -torch.inf).amax(-1)
    some = positive.any(-1)
    low = torch.where(some, low, 0.0).to(torch.float16)
    step = (torch.where(some, high - low.float(), 0.0) / (_LOG_STEPS - 1)).to(torch.float16)
    codes = ((logs - low.float()[..., None]) / _divisor(step)[..., None]).round_().clamp_(0, _LOG_STEPS - 1) + 1
    return torch.where(positive, codes, 0.0).to(torch.uint8), torch.stack((low, step), dim=-1)


def decode_log(codes: Tensor, page_range: Tensor) -> Tensor:
    """Inverse of `encode_log` up to rounding: float32 [..., n]."""
    low, step = page_range.to(torch.float32).unbind(-1)
    values = torch.exp2(low[..., None] + step[..., None] * (codes.to(torch.float32) - 1))
    return torch.where(codes > 0, values, 0.0)


def _divisor(step: Tensor) -> Tensor:
    return torch.where(step > 0, step.float(), 1.0)
