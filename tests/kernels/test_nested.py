"""NestedWeight: which widths can be read, what they cost, views of rows."""

import pytest
import torch

from anybit.kernels import layout
from anybit.kernels.nested import NestedWeight
from anybit.kernels.reference import dequantize
from tests.fixtures.nested import random_nested, with_noise_below, without_below


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
def test_dequantize_depends_on_nothing_below_its_width(width):
    weight = random_nested(24, 64, 32)
    expected = dequantize(weight, width)
    assert torch.equal(dequantize(with_noise_below(weight, width), width), expected)
    assert torch.equal(dequantize(without_below(weight, width), width), expected)


@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_noise_above_a_width_does_change_wider_reads(width):
    weight = random_nested(24, 64, 32)
    assert not torch.equal(dequantize(with_noise_below(weight, width), 8), dequantize(weight, 8))


@pytest.mark.parametrize(
    ("made_for", "readable"),
    [((2,), (2,)), ((3, 2), (2, 3)), ((2, 4), (2, 4)), ((8,), (4, 8)), ((2, 6), (2, 4, 6)), ((2, 3, 4, 6, 8),) * 2],
)
def test_allocate_makes_room_for_the_widths_and_for_the_four_bit_scale(made_for, readable):
    weight = NestedWeight.allocate(16, 64, 32, made_for, torch.float16)
    assert weight.bit_widths == readable
    assert list(weight.chunks) == [chunk.name for chunk in layout.chunks_for(max(made_for))]


def test_bit_widths_need_the_streams_the_float_part_and_the_four_bit_scale():
    weight = random_nested(16, 64, 32)
    streams = {name: chunk for name, chunk in weight.chunks.items() if name != "c6"}
    parts = {width: part for width, part in weight.affine.items() if width != 4}
    shape = (weight.out_features, weight.in_features, weight.group_size)
    assert NestedWeight(*shape, streams, weight.affine).bit_widths == (2, 3, 4)
    assert NestedWeight(*shape, weight.chunks, parts).bit_widths == (2, 3)


@pytest.mark.parametrize("float_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 64, 32), (13, 128, 64), (8, 128, 128)])
def test_bytes_read_counts_the_tensors_that_a_read_touches(shape, float_dtype):
    weight = random_nested(*shape, float_dtype=float_dtype)
    for width in weight.bit_widths:
        touched = [weight.chunks[chunk.name] for chunk in layout.chunks_for(width)]
        touched += [weight.affine[width].scale, weight.affine[width].zero]
        if width > 4:
            touched.append(weight.affine[4].scale)
        assert weight.bytes_read(width) == sum(tensor.nbytes for tensor in touched)


def test_nbytes_is_all_streams_and_all_float_parts():
    weight = random_nested(16, 128, 64)
    assert weight.nbytes == 16 * 128 + 5 * 2 * (16 * 2) * 2


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (8, 24), (16, 29), (0, 29)])
def test_rows_are_a_view_of_the_same_memory(start, stop):
    weight = random_nested(29, 64, 32)
    rows = weight.rows(start, stop)
    assert rows.out_features == stop - start
    for width in weight.bit_widths:
        assert torch.equal(dequantize(rows, width), dequantize(weight, width)[start:stop])
    for name, chunk in rows.chunks.items():
        assert chunk.untyped_storage().data_ptr() == weight.chunks[name].untyped_storage().data_ptr()
