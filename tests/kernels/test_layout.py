"""The bit layout against a definition written bit by bit from its documentation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.kernels import layout
from tests.fixtures.nested import random_codes

# Name, bits and lowest bit of each stream, as FORMATS section 1 lists them.
STREAMS = {"c2": (2, 6), "c3": (1, 5), "c4": (1, 4), "c6": (2, 2), "c8": (2, 0)}
READ_AT = {2: 1, 3: 2, 4: 3, 6: 4, 8: 5}  # how many of them a width reads

quick = settings(max_examples=40, deadline=None)
shapes = st.tuples(st.integers(1, 37), st.integers(1, 5).map(lambda words: 8 * words))
seeds = st.integers(0, 2**16)
widths = st.sampled_from(layout.BIT_WIDTHS)
chunks = st.sampled_from(layout.CHUNKS)


def packed_bit_by_bit(codes: np.ndarray, bits: int, shift: int) -> np.ndarray:
    """Byte (i, j) holds column j of the 8/bits consecutive rows from i·8/bits on, the first in the highest bits."""
    rows, columns = codes.shape
    per_byte = 8 // bits
    packed = np.zeros((-(-rows // 8) * 8 // per_byte, columns), dtype=np.uint8)
    for row, column, bit in np.ndindex(rows, columns, bits):
        value = (int(codes[row, column]) >> (shift + bit)) & 1
        packed[row // per_byte, column] |= value << (8 - bits * (row % per_byte + 1) + bit)
    return packed


def padded(codes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % 8))


@quick
@given(shapes, seeds)
def test_pack_stores_the_documented_bits_in_the_documented_order(shape, seed):
    codes = random_codes(*shape, seed)
    packed = layout.pack(codes)
    assert list(packed) == list(STREAMS)
    for name, (bits, shift) in STREAMS.items():
        assert np.array_equal(packed[name].numpy(), packed_bit_by_bit(codes.numpy(), bits, shift)), name


@quick
@given(shapes, widths, seeds)
def test_unpack_gives_the_prefix_of_every_code_and_zero_padding(shape, width, seed):
    codes = random_codes(*shape, seed)
    assert torch.equal(layout.unpack(layout.pack(codes), width), padded(codes) >> (8 - width))


@quick
@given(shapes, seeds, widths, widths)
def test_unpack_at_a_smaller_width_is_a_prefix_of_a_larger_one(shape, seed, one, other):
    small, large = sorted((one, other))
    packed = layout.pack(random_codes(*shape, seed))
    assert torch.equal(layout.unpack(packed, small), layout.unpack(packed, large) >> (large - small))


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
def test_unpack_needs_the_streams_of_its_width_and_no_other(width):
    codes = random_codes(16, 24)
    packed = layout.pack(codes)
    names = list(STREAMS)[: READ_AT[width]]
    assert [chunk.name for chunk in layout.chunks_for(width)] == names
    assert torch.equal(layout.unpack({name: packed[name] for name in names}, width), codes >> (8 - width))
    for missing in names:
        with pytest.raises(KeyError, match=missing):
            layout.unpack({name: stream for name, stream in packed.items() if name != missing}, width)


@quick
@given(shapes, widths)
def test_code_bytes_are_r_eighths_of_the_padded_weights_and_what_the_streams_hold(shape, width):
    packed = layout.pack(random_codes(*shape))
    rows = -(-shape[0] // 8) * 8
    assert layout.code_bytes(*shape, width) * 8 == rows * shape[1] * width
    assert layout.code_bytes(*shape, width) == sum(packed[chunk.name].nbytes for chunk in layout.chunks_for(width))


@pytest.mark.parametrize(("out_features", "rows"), [(1, 8), (8, 8), (9, 16), (64, 64), (577, 584)])
def test_chunk_shape_is_bits_eighths_of_the_padded_rows(out_features, rows):
    assert layout.padded_rows(out_features) == rows
    for chunk in layout.CHUNKS:
        assert chunk.shape(out_features, 96) == (rows * STREAMS[chunk.name][0] // 8, 96)
        assert layout.pack_chunk(random_codes(out_features, 96), chunk).shape == chunk.shape(out_features, 96)


@quick
@given(shapes, chunks, seeds)
def test_unpack_words_equals_unpack_chunk(shape, chunk, seed):
    packed = layout.pack_chunk(random_codes(*shape, seed), chunk)
    words = layout.unpack_words(packed, chunk)
    assert words.shape == (packed.shape[0], 8 // chunk.bits, shape[1] // 8)
    assert torch.equal(words.view(torch.uint8).view(-1, shape[1]), layout.unpack_chunk(packed, chunk))


@quick
@given(shapes, chunks, seeds, st.data())
def test_gather_rows_equals_unpack_chunk_of_those_rows(shape, chunk, seed, data):
    packed = layout.pack_chunk(random_codes(*shape, seed), chunk)
    row_ids = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=12)), dtype=torch.int64)
    assert torch.equal(layout.gather_rows(packed, chunk, row_ids), layout.unpack_chunk(packed, chunk)[row_ids])


@quick
@given(st.integers(1, 5), chunks, seeds, st.data())
def test_slices_of_columns_and_of_eight_rows_need_no_repacking(blocks, chunk, seed, data):
    codes = random_codes(8 * blocks, 40, seed)
    first, last = sorted(data.draw(st.sets(st.integers(0, 40), min_size=2, max_size=2)))
    top, bottom = sorted(data.draw(st.sets(st.integers(0, blocks), min_size=2, max_size=2)))
    part = codes[8 * top : 8 * bottom, first:last]
    sliced = layout.pack_chunk(codes, chunk)[chunk.bits * top : chunk.bits * bottom, first:last]
    assert torch.equal(sliced, layout.pack_chunk(part, chunk))


@quick
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), chunks, seeds)
def test_blocks_of_eight_rows_concatenate_without_repacking(blocks, chunk, seed):
    parts = [random_codes(8 * count, 16, seed + index) for index, count in enumerate(blocks)]
    joined = torch.cat([layout.pack_chunk(part, chunk) for part in parts])
    assert torch.equal(joined, layout.pack_chunk(torch.cat(parts), chunk))


@pytest.mark.parametrize("width", [-2, 0, 1, 5, 7, 9, 16])
def test_unknown_width_is_refused(width):
    packed = layout.pack(random_codes(8, 8))
    for call in (layout.chunks_for, layout.nibble_chunks, lambda r: layout.unpack(packed, r)):
        with pytest.raises(ValueError, match=f"Bit-width {width} is not one of 2, 3, 4, 6, 8"):
            call(width)


@pytest.mark.parametrize(
    ("width", "hi", "lo"),
    [
        (2, "c2", ""),
        (3, "c2 c3", ""),
        (4, "c2 c3 c4", ""),
        (6, "c2 c3 c4", "c6"),
        (8, "c2 c3 c4", "c6 c8"),
    ],
)
def test_nibble_chunks_split_at_four_bits(width, hi, lo):
    found = layout.nibble_chunks(width)
    assert [" ".join(chunk.name for chunk in part) for part in found] == [hi, lo]


@pytest.mark.parametrize(("width", "count"), [(2, 2), (3, 2), (4, 2), (6, 3), (8, 3)])
def test_num_float_parts_counts_the_four_bit_scale_above_four_bits(width, count):
    assert layout.num_float_parts(width) == count


@pytest.mark.parametrize(("in_features", "group_size"), [(128, 128), (1536, 128), (576, 64), (64, 64), (96, 32)])
def test_auto_group_size_is_the_largest_that_divides(in_features, group_size):
    assert layout.auto_group_size(in_features) == group_size


@pytest.mark.parametrize("in_features", [1, 31, 33, 48, 100, 144])
def test_auto_group_size_refuses_what_32_does_not_divide(in_features):
    with pytest.raises(ValueError, match=f"input size of {in_features} is not a multiple of 32"):
        layout.auto_group_size(in_features)
