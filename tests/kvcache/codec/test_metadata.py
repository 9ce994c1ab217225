"""A page's numbers in a byte each: how far they are off at most, and what zero becomes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from anybit.kvcache.codec.metadata import decode_linear, decode_log, encode_linear, encode_log

sizes = st.floats(1e-3, 1e3)


@given(st.integers(0, 2**31), sizes, st.floats(-50, 50))
def test_linear_levels_are_at_most_half_a_step_off(seed: int, size: float, offset: float) -> None:
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * size + offset
    codes, page_range = encode_linear(values)
    step = page_range[:, 1:].float()
    # The range is rounded to half precision, so the last level may end short of the largest value.
    slack = 256 * step * 2**-11 + values.abs().amax(1, keepdim=True) * 2**-10
    assert bool(((decode_linear(codes, page_range) - values).abs() <= step / 2 + slack).all())


@given(st.integers(0, 2**31), sizes)
def test_log_levels_are_relatively_close_and_zero_is_kept(seed: int, size: float) -> None:
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)).exp() * size
    values[:, ::7] = 0
    codes, page_range = encode_log(values)
    found = decode_log(codes, page_range)
    assert bool((found[:, ::7] == 0).all())
    positive = values > 0
    spread = page_range[:, 1:].float()
    allowed = (spread / 2 + 0.02).expand_as(values)
    assert bool(((found[positive].log2() - values[positive].log2()).abs() <= allowed[positive]).all())


def test_equal_numbers_and_zeros_alone() -> None:
    codes, page_range = encode_linear(torch.full((2, 8), 1.5))
    assert torch.equal(decode_linear(codes, page_range), torch.full((2, 8), 1.5))
    codes, page_range = encode_log(torch.zeros(2, 8))
    assert torch.equal(decode_log(codes, page_range), torch.zeros(2, 8))
    codes, page_range = encode_log(torch.full((1, 8), 4.0))
    assert torch.equal(decode_log(codes, page_range), torch.full((1, 8), 4.0))
