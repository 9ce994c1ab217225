"""A nested weight in the order in which tensor cores take it, so that one 16-byte load feeds a lane.

Rows are cut into tiles of 16, columns into tiles of 128; both are padded with zero codes and zero parts. A tile is four
A fragments of `mma.m16n8k32`: of step i, register j and byte b of lane 4·g + t, the code is that of

    row 16·row_tile + g + 8·(j mod 2),   column 128·column_tile + 32·i + 16·(j div 2) + 4·t + b.

A two-bit stream has one 32-bit word per step, a one-bit stream one word for two steps; the words of a lane lie side by side.
Register j's bits lie in each byte at 4·(j mod 2), and further on by what `_FIRST` says of j div 2; those of the second of
two steps at 2 more. So two streams become nibbles of codes by one selection, of two rows each: `source/product.cuh` does it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.kernels import layout
from anybit.kernels.nested import NestedWeight

TILE_ROWS = 16
TILE_COLUMNS = 128
TILE_TOKENS = 4  # of an n-tile: two digits each make the eight columns of a B fragment
_STEPS, _LANES, _REGISTERS, _BYTES = 4, 32, 4, 4
_FIRST = {"c2": (2, 0), "c3": (1, 0), "c4": (0, 1), "c6": (2, 0), "c8": (0, 2)}
"""Where a chunk's bits lie in a byte, of registers with the first 16 columns of a step and of those with the others."""


@dataclass(frozen=True, slots=True)
class FragmentWeight:
    """What a NestedWeight holds, in fragment order, on a GPU.

    `streams` by chunk name: uint8 [row tiles, column tiles, 32 lanes, bytes]. `parts` by width: [row tiles, groups, 16, 2],
    scale and zero side by side.
    """

    out_features: int
    in_features: int
    group_size: int
    bit_widths: tuple[int, ...]
    streams: dict[str, Tensor]
    parts: dict[int, Tensor]

    @property
    def row_tiles(self) -> int:
        return -(-self.out_features // TILE_ROWS)

    @property
    def column_tiles(self) -> int:
        return -(-self.in_features // TILE_COLUMNS)

    @property
    def nbytes(self) -> int:
        """Bytes resident in memory."""
        return sum(tensor.nbytes for tensor in (*self.streams.values(), *self.parts.values()))

    @property
    def part_dtype(self) -> torch.dtype:
        return next(iter(self.parts.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.streams.values())).device


def pack(weight: NestedWeight) -> FragmentWeight:
    """Copy a weight into fragment order, on its device. The canonical copy is of no further use and may be freed."""
    return FragmentWeight(
        weight.out_features,
        weight.in_features,
        weight.group_size,
        weight.bit_widths,
        {
            chunk.name: _pack_stream(weight.chunks[chunk.name], chunk)
            for chunk in layout.CHUNKS
            if chunk.name in weight.chunks
        },
        {width: _pack_part(part.scale, part.zero, weight.group_size) for width, part in weight.affine.items()},
    )


def _pack_stream(packed: Tensor, chunk: layout.Chunk) -> Tensor:
    fields = _fragments(layout.unpack_chunk(packed, chunk))  # [row tiles, column tiles, steps, lanes, registers, bytes]
    steps = 2 if chunk.bits == 1 else 1  # of a word
    fields = fields.view(*fields.shape[:2], _STEPS // steps, steps, _LANES, _REGISTERS, _BYTES)
    words = torch.zeros_like(fields[:, :, :, 0, :, 0])
    for step in range(steps):
        for register in range(_REGISTERS):
            words |= fields[:, :, :, step, :, register] << bit_position(chunk.name, step, register)
    return words.transpose(2, 3).contiguous().flatten(3)


def bit_position(chunk_name: str, step: int, register: int) -> int:
    """Where a register's bits lie in the bytes of a word, of its first or second step."""
    return _FIRST[chunk_name][register // 2] + 4 * (register % 2) + 2 * step


def _fragments(codes: Tensor) -> Tensor:
    """uint8 [rows, in] -> [row tiles, column tiles, steps, lanes, registers, bytes], zero-padded."""
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    tiles = padded.view(
        padded.shape[0] // TILE_ROWS, 2, TILE_ROWS // 2, padded.shape[1] // TILE_COLUMNS, _STEPS, 2, _LANES // 8, _BYTES
    )  # [row tile, j mod 2, g, column tile, step, j div 2, t, byte]
    return tiles.permute(0, 3, 4, 2, 6, 5, 1, 7).reshape(*tiles.shape[::3][:2], _STEPS, _LANES, _REGISTERS, _BYTES)


def _pack_part(scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    groups, rows = scale.shape
    pairs = torch.stack((scale, zero), -1)  # [groups, rows, 2]
    groups_of_tile = TILE_COLUMNS // group_size
    padded = F.pad(pairs, (0, 0, 0, -rows % TILE_ROWS, 0, -groups % groups_of_tile))
    return padded.view(padded.shape[0], -1, TILE_ROWS, 2).transpose(0, 1).contiguous()
