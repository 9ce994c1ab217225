"""Elementwise functions from operations that round alike at every position of a tensor.

PyTorch's own silu, gelu and tanh use another exponential for the last few elements of a tensor than for the rest, which
would make a row's result depend on how many rows are computed beside it.
"""

import math

from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^−x)."""
    return x / x.neg().exp_().add_(1)


def gelu_tanh(x: Tensor) -> Tensor:
    """½x·(1 + tanh u) = x / (1 + e^−2u) with u = √(2/π)·(x + 0.044715x³) (arXiv 1606.08415, section 2)."""
    exponent = (x * x).mul_(0.044715).add_(1).mul_(x).mul_(-2 * math.sqrt(2 / math.pi))
    return x / exponent.exp_().add_(1)


def softcap_(x: Tensor, cap: float) -> Tensor:
    """cap·tanh(x/cap) = cap − 2cap / (e^(2x/cap) + 1), in place."""
    return x.mul_(2 / cap).exp_().add_(1).reciprocal_().mul_(-2 * cap).add_(cap)
