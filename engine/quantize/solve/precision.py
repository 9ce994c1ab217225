"""The arithmetic of training: bfloat16 products where a device has units for them."""

import functools

import torch

from anybit.engine.machine import cpu_flags

_UNITS = {"avx512_bf16", "amx_bf16"}
_AMPERE = (8, 0)


def training_products(device: torch.device) -> torch.autocast:
    """A context for forward passes: products and attention in bfloat16, all else in float32; no change without such units.

    Rounding adds a hundredth of what narrow codes do to a product, and such units halve the time of a step or better.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=_has_units(device), cache_enabled=False)


def training_dtype(device: torch.device) -> torch.dtype:
    """What `training_products` multiplies: weights that are in it already are not converted for each product."""
    return torch.bfloat16 if _has_units(device) else torch.float32


@functools.cache
def _has_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _AMPERE
    return not _UNITS.isdisjoint(cpu_flags())
