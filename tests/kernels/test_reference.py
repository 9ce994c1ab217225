"""The oracle itself, against values computed by hand and by definition."""

import math
from fractions import Fraction

import pytest
import torch

from anybit.kernels import layout, reference
from anybit.kernels.nested import NestedWeight

CODES = (0b10110110, 0b01001101)  # hi 11 and 4, lo 6 and 13


def store(weight: NestedWeight, codes: torch.Tensor) -> None:
    packed = layout.pack(codes)
    for name, chunk in weight.chunks.items():
        chunk.copy_(packed[name])


def one_group(codes: tuple[int, ...], parts: dict[int, tuple[float, float]]) -> NestedWeight:
    """A weight [1, 32] whose first codes are given, the rest zero."""
    weight = NestedWeight.allocate(1, 32, 32, parts, torch.float16)
    tensor = torch.zeros(1, 32, dtype=torch.uint8)
    tensor[0, : len(codes)] = torch.tensor(codes, dtype=torch.uint8)
    store(weight, tensor)
    for width, (scale, zero) in parts.items():
        weight.affine[width].scale.fill_(scale)
        weight.affine[width].zero.fill_(zero)
    return weight


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (2, [8.0 * 2 - 20, 8.0 * 1 - 20, -20.0]),  # s·(hi >> 2) + z
        (3, [4.0 * 5 - 21, 4.0 * 2 - 21, -21.0]),  # s·(hi >> 1) + z
        (4, [2.0 * 11 - 22, 2.0 * 4 - 22, -22.0]),  # s·hi + z
        (6, [2.0 * 11 + 0.5 * 1 - 23, 2.0 * 4 + 0.5 * 3 - 23, -23.0]),  # s_4·hi + t·(lo >> 2) + z
        (8, [2.0 * 11 + 0.125 * 6 - 24, 2.0 * 4 + 0.125 * 13 - 24, -24.0]),  # s_4·hi + t·lo + z
    ],
)
def test_dequantize_follows_the_formulas(width, expected):
    parts = {2: (8.0, -20.0), 3: (4.0, -21.0), 4: (2.0, -22.0), 6: (0.5, -23.0), 8: (0.125, -24.0)}
    dequantized = reference.dequantize(one_group(CODES, parts), width)
    assert dequantized.shape == (1, 32)
    assert dequantized.dtype == torch.float32
    assert dequantized[0, :3].tolist() == expected


def test_dequantize_is_the_plain_eight_bit_code_when_t_is_a_sixteenth_of_s():
    weight = one_group(tuple(range(0, 256, 8)), {4: (1.0, 0.0), 8: (1 / 16, -3.0)})
    assert torch.equal(reference.dequantize(weight, 8)[0], torch.arange(0, 256, 8) / 16 - 3)


def test_dequantize_takes_each_group_and_row_its_own_numbers():
    weight = NestedWeight.allocate(2, 64, 32, (2,), torch.float16)
    store(weight, torch.full((2, 64), 255, dtype=torch.uint8))
    weight.affine[2].scale[:, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # [groups, rows]
    weight.affine[2].zero[:, :2] = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    expected = torch.tensor([[13.0, 39.0], [26.0, 52.0]]).repeat_interleave(32, 1)
    assert torch.equal(reference.dequantize(weight, 2), expected)


def test_linear_is_the_product_with_the_dequantized_weight():
    weight = one_group(CODES, {4: (2.0, -22.0)})
    x = torch.zeros(2, 32)
    x[0, 0], x[1, :3] = 3.0, torch.tensor([1.0, -1.0, 0.5])
    assert reference.linear(x, weight, 4).tolist() == [[0.0], [0.0 + 14.0 - 11.0]]


def published_slice(code: int, bits: int) -> int:
    """clamp(⌊q/2^(8−r) + ½⌋, 0, 2^r − 1)·2^(8−r), in exact arithmetic."""
    step = 2 ** (8 - bits)
    return min(max(math.floor(Fraction(code, step) + Fraction(1, 2)), 0), 2**bits - 1) * step


@pytest.mark.parametrize("bits", range(1, 9))
def test_matquant_slice_equals_its_definition_for_every_code(bits):
    sliced = reference.matquant_slice(torch.arange(256, dtype=torch.uint8), bits)
    assert sliced.dtype == torch.uint8
    assert sliced.tolist() == [published_slice(code, bits) for code in range(256)]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_matquant_slice_top_bucket_is_half_again_as_wide(bits):
    values, counts = reference.matquant_slice(torch.arange(256, dtype=torch.uint8), bits).unique(return_counts=True)
    step = 2 ** (8 - bits)
    assert len(values) == 2**bits
    assert counts[-1] == 1.5 * step
    assert counts[0] == 0.5 * step
    assert (counts[1:-1] == step).all()


def test_paged_attention_of_a_first_token_is_its_value():
    keys, values = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4, 8)
    out = reference.paged_attention(
        torch.randn(1, 1, 3, 8), keys, values, torch.tensor([[1]]), torch.tensor([[0]]), 0.5
    )
    assert torch.equal(out, values[1, 0, 0].expand(1, 1, 3, 8))


def test_paged_attention_weighs_by_the_softmax_over_the_table_up_to_the_position():
    keys, values = torch.zeros(3, 1, 2, 1), torch.zeros(3, 1, 2, 1)
    keys[2, 0, :, 0], keys[0, 0, :, 0] = torch.tensor([0.0, math.log(2)]), torch.tensor([math.log(5), 99.0])
    values[2, 0, :, 0], values[0, 0, :, 0] = torch.tensor([8.0, 16.0]), torch.tensor([24.0, 1e9])
    q = torch.tensor([2.0]).view(1, 1, 1, 1)
    out = reference.paged_attention(q, keys, values, torch.tensor([[2, 0]]), torch.tensor([[2]]), 0.5)
    assert out.item() == pytest.approx((1 * 8 + 2 * 16 + 5 * 24) / 8)
