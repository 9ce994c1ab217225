"""QET as published: the reordering is exact, the budget holds, and few wide groups beat product quantization."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybit.kvcache.codec.qet_matrix import QetOptions, compress, product_quantization, reorder, restore


@given(st.integers(0, 2**31), st.integers(0, 4), st.integers(1, 3))
def test_reordering_is_undone_exactly(seed: int, num_layers: int, blocks: int) -> None:
    matrix = torch.randn(5, 16 * blocks, generator=torch.Generator().manual_seed(seed))
    matrix[0, :4] = 1.0  # ties
    ordered, swaps = reorder(matrix, num_layers)
    assert [swap.shape for swap in swaps] == [(5, 8 * blocks)] * num_layers
    assert torch.equal(restore(ordered, swaps), matrix)


def test_one_layer_puts_the_smaller_of_each_pair_into_the_left_half() -> None:
    ordered, (swaps,) = reorder(torch.tensor([[3.0, 1.0, 2.0, 5.0]]), 1)
    assert ordered.tolist() == [[1.0, 2.0, 3.0, 5.0]]
    assert swaps.tolist() == [[False, True]]


def test_halves_are_ordered_in_turn() -> None:
    ordered, _ = reorder(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 2)
    # Mins 3, 1 and maxes 4, 2; then each half.
    assert ordered.tolist() == [[1.0, 3.0, 2.0, 4.0]]


def matrix(rows: int = 512, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(rows, columns, generator=generator) @ mixing


def error(budget: float, options: QetOptions) -> float:
    found = compress(matrix(), budget, options, torch.Generator().manual_seed(0))
    assert sum(found.bits.values()) <= budget * matrix().numel()
    return float((found.decode() - matrix()).square().mean())


@pytest.mark.parametrize("budget", [3, 4, 6])
def test_qet_beats_product_quantization_with_few_wide_groups(budget: int) -> None:
    assert error(budget, QetOptions(4)) < 0.6 * error(budget, product_quantization(4))


def test_more_budget_errs_less() -> None:
    errors = [error(budget, QetOptions(8)) for budget in (3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)


def test_bits_are_counted_whole() -> None:
    found = compress(matrix(), 4, QetOptions(4), torch.Generator().manual_seed(0))
    assert found.bits["swaps"] == 3 * matrix().numel() // 2
    first, second = found.stages
    assert (len(first.swaps), len(second.swaps)) == (3, 0)
    assert found.bits["codebooks"] == sum(10 * stage.codebooks.shape[1] * 64 + 64 for stage in found.stages)
    for stage in found.stages:
        # Ten bits: no more than 1,024 different numbers.
        assert len(stage.codebooks.unique()) <= 1024


def test_what_cannot_be_compressed_is_refused() -> None:
    generator = torch.Generator()
    with pytest.raises(ValueError, match="holds no codebook"):
        compress(matrix(), 1.0, QetOptions(4), generator)
    with pytest.raises(ValueError, match="5 equal groups"):
        compress(matrix(), 4, QetOptions(5), generator)
    with pytest.raises(ValueError, match="halved 3 times"):
        compress(matrix(columns=60), 4, QetOptions(4), generator)
    with pytest.raises(ValueError, match="not finite"):
        compress(torch.full((8, 8), torch.nan), 4, QetOptions(4), generator)


def test_other_directions_of_a_matrix_are_compressed_alike() -> None:
    """A weight is a matrix like any other."""
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    found = compress(weight, 6, QetOptions(8), torch.Generator().manual_seed(0))
    assert float((found.decode() - weight).square().mean()) < 0.2
