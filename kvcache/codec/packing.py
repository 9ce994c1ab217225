"""Codes of 2, 3, 4, 6 or 8 bits as bytes: a code's high bits in one plane, what is left of it in the next.

Planes hold 4, 2 or 1 bits of each code, so that every plane is read with shifts and masks alone and codes of 6 bits need no
fields across bytes. The first code of a byte has its lowest bits.
"""

import torch
from torch import Tensor

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
CODE_SIZES = tuple(_PLANES)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] -> uint8 [..., n·bits/8], the planes one after the other; n a multiple of 8."""
    planes = []
    below = bits
    for width in _planes(bits):
        below -= width
        planes.append(_pack_plane((codes >> below) & ((1 << width) - 1), width))
    return torch.cat(planes, dim=-1)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`."""
    num_codes = packed.shape[-1] * 8 // bits
    codes = torch.zeros(*packed.shape[:-1], num_codes, dtype=torch.uint8, device=packed.device)
    start = 0
    for width in _planes(bits):
        stop = start + num_codes * width // 8
        codes = (codes << width) | _unpack_plane(packed[..., start:stop], width)
        start = stop
    return codes


def _planes(bits: int) -> tuple[int, ...]:
    if bits not in _PLANES:
        raise ValueError(f"Codes have {', '.join(map(str, CODE_SIZES))} bits, not {bits}.")
    return _PLANES[bits]


def _pack_plane(fields: Tensor, width: int) -> Tensor:
    of_byte = 8 // width
    grouped = fields.reshape(*fields.shape[:-1], fields.shape[-1] // of_byte, of_byte)
    return (grouped << _shifts(width, fields.device)).sum(-1, dtype=torch.uint8)


def _unpack_plane(packed: Tensor, width: int) -> Tensor:
    return ((packed[..., None] >> _shifts(width, packed.device)) & ((1 << width) - 1)).flatten(-2)


def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)
