"""Nested linear layers against the oracle, and the promise that a row does not depend on its neighbours.

Error bound: activations enter as fixed point numbers that are off by at most 6.2e-5 of their group's largest magnitude.
Over random rows that is about 1e-4 of the norm of the result; 3e-4 is demanded of each row.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.kernels import dispatch, fallbacks, layout, reference
from anybit.kernels.portable import fixed_point
from anybit.kernels.portable import linear as portable
from tests.fixtures.nested import normal, random_nested, with_noise_below, without_below

LARGEST_ERROR = 3e-4
SHAPES = [(8, 32, 32), (13, 96, 32), (40, 320, 64), (70, 576, 64), (24, 640, 128), (1, 128, 128)]
WEIGHTS = [random_nested(*shape) for shape in SHAPES]
widths = st.sampled_from(layout.BIT_WIDTHS)
weights = st.sampled_from(WEIGHTS)


def shape_name(value: object) -> str | None:
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


def assert_near_oracle(y, x, weight, width):
    expected = reference.linear(x, weight, width)
    assert y.shape == expected.shape
    error = (y - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() <= LARGEST_ERROR


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_linear_is_near_the_oracle(shape, width, tokens):
    weight, x = random_nested(*shape), normal(tokens, shape[1])
    y = dispatch.linear(x, weight, [(width, 0, tokens)])
    if shape[0] > 1:
        assert_near_oracle(y, x, weight, width)
    else:
        # A single output may cancel to nothing, so there is no norm to compare with.
        bound = LARGEST_ERROR * x.norm(dim=1, keepdim=True) * reference.dequantize(weight, width).norm()
        assert ((y - reference.linear(x, weight, width)).abs() <= bound).all()


@pytest.mark.parametrize("float_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("magnitude", [1e-12, 1e6])
def test_linear_error_is_relative_to_the_input(float_dtype, magnitude):
    weight, x = random_nested(40, 128, 64, float_dtype=float_dtype), normal(6, 128) * magnitude
    assert_near_oracle(portable.linear(x, weight, 8), x, weight, 8)


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
def test_linear_reads_no_stream_below_its_width(width):
    weight, x = random_nested(24, 128, 64), normal(3, 128)
    expected = portable.linear(x, weight, width)
    assert torch.equal(portable.linear(x, with_noise_below(weight, width), width), expected)
    assert torch.equal(portable.linear(x, without_below(weight, width), width), expected)


@pytest.mark.parametrize("width", [2, 8])
@pytest.mark.parametrize(("tile_rows", "block_sums"), [(8, 1), (16, 300), (40, 1 << 21), (1 << 12, 1)])
def test_linear_in_several_tiles_and_blocks_gives_the_same_bits(monkeypatch, width, tile_rows, block_sums):
    weight, x = random_nested(70, 576, 64), normal(11, 576)
    expected = portable.linear(x, weight, width)
    assert_near_oracle(expected, x, weight, width)
    monkeypatch.setattr(portable, "_TILE_WEIGHTS", tile_rows * weight.in_features)
    monkeypatch.setattr(portable, "_BLOCK_SUMS", block_sums)
    assert torch.equal(portable.linear(x, weight, width), expected)


@settings(max_examples=60, deadline=None)
@given(weights, widths, st.integers(1, 70), st.integers(0, 2**16), st.data())
def test_linear_gives_a_row_the_same_bits_in_any_batch_at_any_position(weight, width, tokens, seed, data):
    x = normal(tokens, weight.in_features, seed=seed)
    rows = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=9))
    expected = portable.linear(x, weight, width)
    assert torch.equal(portable.linear(x[rows], weight, width), expected[rows])


@pytest.mark.parametrize("out_features", [8, 24, 40, 64, 72, 200])
@pytest.mark.parametrize(("groups", "threads"), [(1, 1), (4, 1), (5, 1), (9, 2), (24, 1)])
def test_linear_sums_the_groups_of_every_output_in_one_order(out_features, groups, threads):
    torch.set_num_threads(threads)
    weight, x = random_nested(out_features, 32 * groups, 32), normal(5, 32 * groups)
    together = portable.linear(x, weight, 4)
    alone = torch.cat([portable.linear(row, weight, 4) for row in x.split(1)])
    assert torch.equal(together, alone)


@settings(max_examples=40, deadline=None)
@given(weights, st.lists(st.tuples(widths, st.integers(1, 20)), min_size=1, max_size=6), st.integers(0, 2**16))
def test_mixed_width_segments_give_every_row_exactly_its_own_width(weight, parts, seed):
    ends = torch.tensor([count for _, count in parts]).cumsum(0).tolist()
    segments = [(width, end - count, end) for (width, count), end in zip(parts, ends, strict=True)]
    x = normal(ends[-1], weight.in_features, seed=seed)
    y = dispatch.linear(x, weight, segments)
    assert y.shape == (ends[-1], weight.out_features)
    for width, start, stop in segments:
        alone = torch.cat([portable.linear(x[row : row + 1], weight, width) for row in range(start, stop)])
        assert torch.equal(y[start:stop], alone)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width", [2, 8])
def test_input_that_is_not_finite_spoils_its_own_row_and_no_other(bad, width):
    weight, x = random_nested(40, 128, 64), normal(6, 128)
    expected = portable.linear(x, weight, width)
    x[3, 77] = bad
    y = portable.linear(x, weight, width)
    assert not torch.isfinite(y[3]).any()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(y[others], expected[others])


def test_linear_of_zeros_is_zero():
    assert not portable.linear(torch.zeros(2, 64), random_nested(16, 64, 32), 8).any()


@pytest.mark.parametrize("width", [3, 6])
def test_linear_in_bfloat16_rounds_the_float32_result(width):
    weight, x = random_nested(24, 128, 64), normal(4, 128).bfloat16()
    y = portable.linear(x, weight, width)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, portable.linear(x.float(), weight, width).bfloat16())


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
def test_linear_without_int8_products_gives_the_same_bits_and_is_counted(monkeypatch, width):
    weight, x = random_nested(40, 320, 64), normal(9, 320)
    expected = portable.linear(x, weight, width)
    monkeypatch.setattr(fixed_point, "_int8_products_are_exact", lambda *_: False)
    before = sum(fallbacks.snapshot().values())
    assert torch.equal(portable.linear(x, weight, width), expected)
    assert sum(fallbacks.snapshot().values()) > before


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_embedding_equals_the_rows_of_the_oracle_bitwise(shape, width):
    weight = random_nested(*shape)
    token_ids = torch.randint(shape[0], (17,), generator=torch.Generator().manual_seed(1))
    expected = reference.dequantize(weight, width)[token_ids]
    assert torch.equal(dispatch.embedding(token_ids, weight, width), expected)
    assert torch.equal(dispatch.embedding(token_ids, with_noise_below(weight, width), width), expected)
    assert torch.equal(dispatch.embedding(token_ids, without_below(weight, width), width), expected)


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
def test_unpack_nibbles_gives_the_bits_that_a_width_reads(width):
    weight = random_nested(13, 64, 32)
    codes = layout.unpack(weight.chunks, 8)
    hi, lo = portable.unpack_nibbles(weight, width)
    assert torch.equal(hi, codes >> 4 >> max(0, 4 - width))
    assert (lo is None) == (width <= 4)
    if lo is not None:
        assert torch.equal(lo, (codes & 15) >> (8 - width))


@pytest.mark.parametrize("width", [0, 5, 7])
def test_unknown_width_is_refused(width):
    with pytest.raises(ValueError, match=f"Bit-width {width} is not one of"):
        portable.linear(normal(1, 64), random_nested(8, 64, 32), width)
