"""The randomised Hadamard rotation of vectors: random signs, then a butterfly of additions (arXiv 2404.00456)."""

import torch
from torch import Tensor

_SEED = 0x51E7


def rotation_signs(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The fixed random signs ±1 of this size: float32 [size], the same on every machine."""
    generator = torch.Generator().manual_seed(_SEED + size)
    return (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(device, torch.float32)


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """R x with R = H·diag(signs)/√size, orthogonal: x [..., size], a power of two -> float32 of the same shape."""
    return _butterfly(x.to(torch.float32) * signs)


def unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """Rᵀ x, the inverse of `rotate`."""
    return _butterfly(x.to(torch.float32)) * signs


def _butterfly(x: Tensor) -> Tensor:
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"A Hadamard rotation takes a power of two of channels, not {size}.")
    span = 1
    while span < size:
        pairs = x.reshape(*x.shape[:-1], -1, 2, span)
        x = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), dim=-2)
        x = x.reshape(*x.shape[:-3], size)
        span *= 2
    return x.mul(size**-0.5)
