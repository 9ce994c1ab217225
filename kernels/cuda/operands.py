"""A weight in fragment order as kernels take it: addresses, and the constants that they are compiled for."""

import ctypes

import torch

from anybit.kernels import layout
from anybit.kernels.cuda.fragments import FragmentWeight
from anybit.kernels.cuda.values import PARTS


class _Weight(ctypes.Structure):
    """`Weight` of source/nested.cuh."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("c2", "c3", "c4", "c6", "c8", "high", "low")]


class _MixedWeight(ctypes.Structure):
    """`MixedWeight` of source/nested.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("c2", "c3", "c4", "c6", "c8")),
        ("parts", ctypes.c_void_p * len(layout.BIT_WIDTHS)),
    ]


def weight_constants(bit_width: int, group_size: int, part_dtype: torch.dtype) -> dict[str, int]:
    """Of every kernel that reads a weight at one width (`source/nested.cuh`)."""
    return {"BITS": bit_width, "GROUP": group_size, "PART": PARTS[part_dtype]}


def describe_weight(weight: FragmentWeight, bit_width: int) -> ctypes.Structure:
    """What a read at one width needs."""
    addresses = {name: stream.data_ptr() for name, stream in weight.streams.items()}
    addresses["high"] = weight.parts[min(bit_width, layout.NIBBLE_BITS)].data_ptr()
    if bit_width > layout.NIBBLE_BITS:
        addresses["low"] = weight.parts[bit_width].data_ptr()
    return _Weight(**addresses)


def describe_mixed_weight(weight: FragmentWeight) -> ctypes.Structure:
    """What reads at all widths of a weight need."""
    parts = [weight.parts[width].data_ptr() if width in weight.parts else None for width in layout.BIT_WIDTHS]
    streams = {name: stream.data_ptr() for name, stream in weight.streams.items()}
    return _MixedWeight(**streams, parts=(ctypes.c_void_p * len(parts))(*parts))
