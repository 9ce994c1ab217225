"""Activations as fixed point numbers: how near, how exact, and what happens without int8 products."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.kernels import fallbacks
from anybit.kernels.portable import fixed_point
from anybit.kernels.portable.fixed_point import FixedPoint
from tests.fixtures.nested import normal

LARGEST = 8127


def numbers(x: FixedPoint) -> torch.Tensor:
    """The integers q, float64 [groups, tokens, group_size]."""
    return x.digits[:, 0].double() * 128 + x.digits[:, 1].double()


def nibbles(rows: int, in_features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(16, (rows, in_features), generator=generator, dtype=torch.uint8)


def exact_product(x: FixedPoint, codes: torch.Tensor) -> torch.Tensor:
    q = numbers(x)
    return torch.einsum("gti,rgi->gtr", q, codes.double().view(codes.shape[0], q.shape[0], -1))


def extreme(sign: float, group_size: int) -> FixedPoint:
    """Every activation at the largest magnitude there is."""
    return FixedPoint.quantize(torch.full((3, group_size), sign), group_size)


@pytest.fixture
def without_int8(monkeypatch):
    monkeypatch.setattr(fixed_point, "_int8_products_are_exact", lambda *_: False)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from((32, 64, 128)),
    st.integers(1, 3),
    st.integers(1, 9),
    st.floats(1e-20, 1e20),
    st.integers(0, 2**16),
)
def test_quantize_is_within_half_a_step_of_every_activation(group_size, groups, tokens, magnitude, seed):
    x = normal(tokens, groups * group_size, seed=seed) * magnitude
    fixed = FixedPoint.quantize(x, group_size)
    grouped = x.view(tokens, groups, group_size).transpose(0, 1).double()
    step = fixed.step.double()
    assert torch.allclose(step, grouped.abs().amax(2, keepdim=True) / LARGEST, rtol=1e-6, atol=0)
    # Rounding x/step itself to a float32 moves a tie by at most 8127 · 2^-24 of a step.
    assert ((numbers(fixed) * step - grouped).abs() <= 0.501 * step).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**16))
def test_quantize_keeps_digits_small_and_totals_exact(tokens, seed):
    fixed = FixedPoint.quantize(normal(tokens, 256, seed=seed), 64)
    assert fixed.digits.dtype == torch.int8
    assert fixed.digits.int().abs().max() <= 64
    assert numbers(fixed).abs().max() == LARGEST
    assert torch.equal(fixed.total.double(), numbers(fixed).sum(2, keepdim=True))


def test_quantize_of_zeros_is_zero():
    fixed = FixedPoint.quantize(torch.zeros(2, 64), 32)
    assert not fixed.digits.any()
    assert not fixed.step.any()
    assert not fixed.total.any()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_product_is_exact(group_size, tokens):
    fixed = FixedPoint.quantize(normal(tokens, 4 * group_size), group_size)
    codes = nibbles(24, 4 * group_size)
    product = fixed.product(codes, slice(0, tokens))
    assert product.dtype == torch.float32
    assert torch.equal(product.double(), exact_product(fixed, codes))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_product_of_the_largest_numbers_is_exact(group_size, sign):
    fixed, codes = extreme(sign, group_size), torch.full((8, group_size), 15, dtype=torch.uint8)
    assert (fixed.product(codes, slice(0, 3)) == sign * LARGEST * 15 * group_size).all()


def test_product_takes_a_slice_of_the_tokens():
    fixed, codes = FixedPoint.quantize(normal(9, 64), 32), nibbles(8, 64)
    assert torch.equal(fixed.product(codes, slice(3, 8)), fixed.product(codes, slice(0, 9))[:, 3:8])


@pytest.mark.usefixtures("without_int8")
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_float_fallback_gives_the_same_exact_sums(group_size):
    fixed = FixedPoint.quantize(normal(33, 4 * group_size), group_size)
    codes = nibbles(24, 4 * group_size)
    assert torch.equal(fixed.product(codes, slice(0, 33)).double(), exact_product(fixed, codes))
    largest = torch.full((8, group_size), 15, dtype=torch.uint8)
    assert (extreme(1.0, group_size).product(largest, slice(0, 3)) == LARGEST * 15 * group_size).all()


@pytest.mark.usefixtures("without_int8")
def test_float_fallback_is_counted_every_time_and_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(fallbacks, "_calls", type(fallbacks._calls)())
    fixed, codes = FixedPoint.quantize(normal(2, 32), 32), nibbles(8, 32)
    with caplog.at_level(logging.WARNING, "anybit.kernels"):
        fixed.product(codes, slice(0, 2))
        fixed.product(codes, slice(0, 2))
    ((key, count),) = fallbacks.snapshot().items()
    assert key.startswith("fixed_point_product:")
    assert count == 2
    assert len(caplog.records) == 1


def saturating_int_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sums kept in 16 bits."""
    return (left.int() @ right.int()).clamp(-(2**15), 2**15 - 1)


def refusing_int_mm(*_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("not implemented")


@pytest.mark.parametrize("int_mm", [saturating_int_mm, refusing_int_mm])
def test_int8_products_that_are_inexact_or_missing_are_noticed(monkeypatch, int_mm):
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    assert not fixed_point._int8_products_are_exact.__wrapped__(torch.device("cpu"), 64)
