"""Rotary position embeddings (arXiv 2104.09864), in the half-split order of Hugging Face checkpoints."""

import math

import torch
from torch import Tensor

from anybit.engine.models.config import DecoderConfig, RopeScaling


class RotaryEmbedding:
    """Rotates queries and keys by angles that depend on their position.

    The table is computed once, so that a position has the same sine and cosine in every batch.
    """

    def __init__(self, config: DecoderConfig, max_positions: int, device: torch.device | str = "cpu") -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = _scaled(1.0 / config.rope_theta**exponents, config.rope_scaling)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
        self._cos = angles.cos().to(device)  # [positions, head_dim / 2]
        self._sin = angles.sin().to(device)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [tokens, heads, head_dim], positions int64 [tokens] -> the same shape and dtype, rotated."""
        cos = self._cos[positions].unsqueeze(1)
        sin = self._sin[positions].unsqueeze(1)
        first, second = x.to(torch.float32).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "default":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: long wavelengths are stretched by the factor, short ones kept, those between interpolated.
    wavelengths = 2 * math.pi / frequencies
    rotations = scaling.original_max_position_embeddings / wavelengths
    smooth = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
