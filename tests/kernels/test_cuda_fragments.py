"""The order in which the GPU's kernels read weights, against its definition; runs on the CPU."""

import itertools

import pytest
import torch

from anybit.kernels import layout
from anybit.kernels.cuda import fragments
from tests.fixtures.nested import random_codes, random_nested

SHAPES = [(16, 128, 64), (40, 320, 64), (13, 96, 32), (70, 640, 128)]


def places():
    """Of every code of a tile: row and column, lane, step, register and byte, as the module defines them."""
    for step, lane, register, byte in itertools.product(range(4), range(32), range(4), range(4)):
        row = lane // 4 + 8 * (register % 2)
        column = 32 * step + 16 * (register // 2) + 4 * (lane % 4) + byte
        yield row, column, lane, step, register, byte


def unpack(stream: torch.Tensor, chunk: layout.Chunk) -> torch.Tensor:
    """One tile's stream, uint8 [32, bytes] -> the chunk's field of every code, uint8 [16, 128]."""
    fields = torch.zeros(16, 128, dtype=torch.uint8)
    for row, column, lane, step, register, byte in places():
        first_of_row, is_second_half = 4 * (register % 2), register // 2
        if chunk.bits == 2:
            position = (2 - 2 * is_second_half) if chunk.name in ("c2", "c6") else 2 * is_second_half
            value = int(stream[lane, 4 * step + byte]) >> (first_of_row + position)
        else:
            position = (1 - is_second_half) if chunk.name == "c3" else is_second_half
            value = int(stream[lane, 4 * (step // 2) + byte]) >> (first_of_row + position + 2 * (step % 2))
        fields[row, column] = value & chunk.mask
    return fields


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_lie_where_the_definition_says(shape):
    weight = fragments.pack(random_nested(*shape))
    codes = torch.zeros(weight.row_tiles * 16, weight.column_tiles * 128, dtype=torch.uint8)
    codes[: shape[0], : shape[1]] = random_codes(*shape[:2])
    for chunk in layout.CHUNKS:
        stream = weight.streams[chunk.name]
        assert stream.shape == (weight.row_tiles, weight.column_tiles, 32, 8 * chunk.bits)
        for row_tile, column_tile in itertools.product(range(weight.row_tiles), range(weight.column_tiles)):
            tile = codes[16 * row_tile : 16 * (row_tile + 1), 128 * column_tile : 128 * (column_tile + 1)]
            assert torch.equal(unpack(stream[row_tile, column_tile], chunk), (tile >> chunk.shift) & chunk.mask)


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_lie_beside_each_other_by_row_tile_and_group(shape):
    nested = random_nested(*shape)
    packed = fragments.pack(nested)
    groups = packed.column_tiles * (128 // shape[2])
    for width, part in nested.affine.items():
        pairs = packed.parts[width]
        assert pairs.shape == (packed.row_tiles, groups, 16, 2)
        by_row = pairs.transpose(1, 2).flatten(0, 1)  # [rows, groups, 2]
        assert torch.equal(by_row[: shape[0], : nested.num_groups, 0], part.scale.T[: shape[0]])
        assert torch.equal(by_row[: shape[0], : nested.num_groups, 1], part.zero.T[: shape[0]])
        assert not by_row[:, nested.num_groups :].any()


def test_a_weight_of_few_widths_has_few_streams():
    packed = fragments.pack(random_nested(16, 128, 64, bit_widths=(2, 3)))
    assert set(packed.streams) == {"c2", "c3"}
    assert packed.bit_widths == (2, 3)
    assert packed.nbytes == 16 * 128 * 3 // 8 + 2 * 2 * 16 * 2 * 2
