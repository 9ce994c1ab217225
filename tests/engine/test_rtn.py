"""Round to nearest: optimal float parts, errors that fall with the bits, ranges and weights of every kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.engine.evaluate.matquant_slice import sliced_weight
from anybit.engine.quantize import rtn
from anybit.engine.quantize.rtn import float_part_dtype, quantize_rtn
from anybit.kernels import layout
from anybit.kernels.reference import dequantize
from tests.fixtures.nested import normal

SERVED = layout.BIT_WIDTHS


def relative_error(weight, dequantized):
    return float((weight.double() - dequantized.double()).square().sum() / weight.double().square().sum())


def error_at(weight, bit_width, group_size=64):
    return relative_error(weight, dequantize(quantize_rtn(weight, group_size, (bit_width,)), bit_width))


def grouped(values, group_size):
    return values.double().view(values.shape[0], -1, group_size)


def levels_and_targets(weight, nested, bit_width):
    """What the float part of a width is fitted to: its own levels, and what they shall explain, by (row, group)."""
    codes = layout.unpack(nested.chunks, 8)[: nested.out_features]
    targets = grouped(weight, nested.group_size)
    if bit_width <= 4:
        return grouped(codes >> (8 - bit_width), nested.group_size), targets
    four = nested.affine[4].scale[:, : nested.out_features].T.double().unsqueeze(2)
    return grouped((codes & 15) >> (8 - bit_width), nested.group_size), targets - four * grouped(
        codes >> 4, nested.group_size
    )


def part_of(nested, bit_width):
    part = nested.affine[bit_width]
    return (tensor[:, : nested.out_features].T.double().unsqueeze(2) for tensor in (part.scale, part.zero))


def squared_error(levels, targets, scale, zero):
    return (scale * levels + zero - targets).square().sum(2)


@pytest.mark.parametrize("bit_width", SERVED)
@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_float_part_is_the_least_squares_solution(bit_width, kind):
    # Numbers this large get a float32 part, so that nothing but the method stands between it and the optimum.
    weight = 1e5 * (normal(16, 256) if kind == "normal" else normal(16, 256).exp())
    nested = quantize_rtn(weight, 64, SERVED)
    levels, targets = levels_and_targets(weight, nested, bit_width)
    design = torch.stack((levels, torch.ones_like(levels)), -1)
    solution = torch.linalg.lstsq(design, targets.unsqueeze(-1)).solution.squeeze(-1)
    best = squared_error(levels, targets, *solution.unsqueeze(2).unbind(-1))
    assert (squared_error(levels, targets, *part_of(nested, bit_width)) <= best * (1 + 1e-6)).all()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SERVED),
    st.floats(-0.1, 0.1).filter(lambda change: abs(change) > 1e-3),
    st.floats(-0.5, 0.5).filter(lambda change: abs(change) > 1e-3),
    st.integers(0, 99),
)
def test_no_other_scale_or_zero_lowers_the_error(bit_width, scale_change, zero_change, seed):
    weight = 1e5 * normal(8, 128, seed=seed)
    nested = quantize_rtn(weight, 32, SERVED)
    levels, targets = levels_and_targets(weight, nested, bit_width)
    scale, zero = part_of(nested, bit_width)
    least = squared_error(levels, targets, scale, zero)
    for other in ((scale * (1 + scale_change), zero), (scale, zero + scale * zero_change)):
        assert (squared_error(levels, targets, *other) >= least).all()


@pytest.mark.parametrize(("bit_width", "cost"), [(2, 1e-3), (3, 1e-3), (4, 1e-3), (6, 5e-3), (8, 5e-2)])
def test_float16_parts_cost_little(bit_width, cost):
    weight = normal(64, 256)
    exact = quantize_rtn(weight * 1e5, 64, SERVED)
    half = quantize_rtn(weight, 64, SERVED)
    assert (exact.affine[2].scale.dtype, half.affine[2].scale.dtype) == (torch.float32, torch.float16)
    with_float32 = relative_error(weight * 1e5, dequantize(exact, bit_width))
    assert relative_error(weight, dequantize(half, bit_width)) <= with_float32 * (1 + cost)


@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
@pytest.mark.parametrize("distribution", ["normal", "uniform", "heavy"])
def test_error_falls_with_every_width(distribution, group_size):
    weight = normal(32, 256)
    weight = {"normal": weight, "uniform": torch.special.ndtr(weight), "heavy": weight**3}[distribution]
    nested = quantize_rtn(weight, group_size, SERVED)
    errors = [relative_error(weight, dequantize(nested, width)) for width in SERVED]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100


@pytest.mark.parametrize("bit_width", SERVED)
def test_asking_for_fewer_widths_changes_none_of_them(bit_width):
    weight = normal(24, 128)
    alone, together = (quantize_rtn(weight, 64, widths) for widths in ((bit_width,), SERVED))
    assert torch.equal(dequantize(alone, bit_width), dequantize(together, bit_width))


# FORMATS, section 1: relative error of Gaussian groups of 128 for the published slice and for truncation.
@pytest.mark.parametrize(
    ("bit_width", "slice_error", "own_error"), [(2, 0.171, 0.134), (3, 0.040, 0.036), (4, 0.0098, 0.0091)]
)
def test_truncation_beats_the_published_slice_by_as_much_as_documented(bit_width, slice_error, own_error):
    weight = normal(512, 1024)
    published = relative_error(weight, sliced_weight(weight, 128, bit_width))
    own = error_at(weight, bit_width, 128)
    assert own < published
    assert published == pytest.approx(slice_error, rel=0.02)
    assert own == pytest.approx(own_error, rel=0.02)


@pytest.mark.parametrize("constant", [0.0, 0.02, -1.0, 777.0, 1e-9, -1e30])
def test_constant_groups_are_kept(constant):
    weight = torch.full((8, 64), constant)
    nested = quantize_rtn(weight, 32, SERVED)
    for width in SERVED:
        assert torch.allclose(dequantize(nested, width), weight, rtol=2**-11, atol=0)


def test_constant_group_beside_others_is_kept():
    weight = normal(8, 96)
    weight[3, 32:64] = 0.7
    nested = quantize_rtn(weight, 32, SERVED)
    for width in SERVED:
        dequantized = dequantize(nested, width)
        assert torch.allclose(dequantized[3, 32:64], weight[3, 32:64], rtol=2**-11)
        assert relative_error(weight, dequantized) < 0.2


@settings(max_examples=60, deadline=None)
@given(st.floats(-30, 30), st.floats(-3, 3), st.integers(0, 99))
def test_error_is_relative_to_the_range_however_huge_or_tiny(exponent, offset, seed):
    weight = (normal(8, 64, seed=seed) + offset) * 10.0**exponent
    nested = quantize_rtn(weight, 32, SERVED)
    around = grouped(weight - weight.mean(), 32).square().sum()
    for width, bound in zip(SERVED, (0.2, 0.06, 0.02, 2e-3, 2e-4), strict=True):
        error = (weight.double() - dequantize(nested, width).double()).square().sum()
        assert error <= bound * around


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [
        (0.0, torch.float16),
        (1.0, torch.float16),
        (0.011, torch.float16),
        (0.009, torch.float32),
        (2.9e4, torch.float16),
        (3.1e4, torch.float32),
        (1e30, torch.float32),
        (1e-30, torch.float32),
    ],
)
def test_float_part_dtype_follows_the_range(largest, dtype):
    weight = torch.zeros(8, 64)
    weight[5, 7] = -largest
    assert float_part_dtype(weight) == dtype
    nested = quantize_rtn(weight, 32, (2, 8))
    assert {part.scale.dtype for part in nested.affine.values()} == {dtype}
    assert torch.isfinite(dequantize(nested, 8)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weight_that_is_not_finite_is_refused(bad):
    weight = normal(8, 64)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="A weight is not finite"):
        quantize_rtn(weight, 32, SERVED)


def test_group_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group size 128 does not divide the input size 192"):
        quantize_rtn(normal(8, 192), 128, SERVED)


def test_rows_are_solved_one_like_another_whatever_the_block(monkeypatch):
    weight = normal(37, 64)
    whole = quantize_rtn(weight, 32, SERVED)
    monkeypatch.setattr(rtn, "_BLOCK_WEIGHTS", 8 * 64)
    blocks = quantize_rtn(weight, 32, SERVED)
    for width in SERVED:
        assert torch.equal(dequantize(blocks, width), dequantize(whole, width))
        assert not blocks.affine[width].scale[:, 37:].any()
        assert not blocks.affine[width].zero[:, 37:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes_are_read_as_float32(dtype):
    weight = normal(8, 64).to(dtype)
    expected = quantize_rtn(weight.float(), 32, SERVED)
    assert torch.equal(dequantize(quantize_rtn(weight, 32, SERVED), 8), dequantize(expected, 8))


def test_outlier_does_not_break_its_neighbours():
    weight = normal(8, 64)
    weight[0, 0] = 1000.0
    dequantized = dequantize(quantize_rtn(weight, 32, SERVED), 8)
    assert torch.allclose(dequantized[0, 0], weight[0, 0], rtol=1e-2)
    assert relative_error(weight[1:], dequantized[1:]) < 1e-3
