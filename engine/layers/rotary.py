"""Rotary position embeddings (arXiv 2104.09864), in the half-split order of Hugging Face checkpoints."""

import math

import torch
from torch import Tensor

from anybit.engine.models.config import Rope, RopeScaling


class RotaryEmbedding:
    """Rotates queries and keys by angles that depend on their position.

    The table is computed once, so that a position has the same sine and cosine in every batch.
    """

    def __init__(self, rope: Rope, head_dim: int, max_positions: int, device: torch.device | str = "cpu") -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = _scaled(1.0 / rope.theta**exponents, rope)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
        self.cosines = (angles.cos() * rope.scaling.attention_factor).to(device)  # [positions, head_dim / 2]
        self.sines = (angles.sin() * rope.scaling.attention_factor).to(device)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [tokens, heads, head_dim], positions int64 [tokens] -> the same shape and dtype, rotated."""
        cos = self.cosines[positions].unsqueeze(1)
        sin = self.sines[positions].unsqueeze(1)
        first, second = x.to(torch.float32).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _scaled(frequencies: Tensor, rope: Rope) -> Tensor:
    scaling = rope.scaling
    if scaling.kind == "default":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "divisors":
        return frequencies / torch.tensor(scaling.divisors, dtype=torch.float32)
    if scaling.kind == "yarn":
        kept = _yarn_kept(frequencies.numel(), rope.theta, scaling)
    else:
        # llama3: long wavelengths are stretched by the factor, short ones kept, those between interpolated.
        rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn_kept(num_frequencies: int, theta: float, scaling: RopeScaling) -> Tensor:
    """How much of each frequency YaRN leaves as it is (arXiv 2309.00071, equations 18 to 21), in [0, 1]."""

    def index_of(rotations: float) -> float:
        """Where the frequency lies that turns `rotations` times over the original context."""
        return (
            num_frequencies
            * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi))
            / math.log(theta)
        )

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_frequencies - 1)
    ramp = (torch.arange(num_frequencies, dtype=torch.float32) - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0.0, 1.0)
