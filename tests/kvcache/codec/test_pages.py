"""Page codecs: bits to the byte, errors that fall with bits, and rows of every kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.kvcache.codec.pages import CoarseCodec, PageCodec, PairCodec, UniformCodec, stored_bits
from anybit.kvcache.codec.universal import PAIR_BITS, tree_table, universal_table

PAIRS = {bits: universal_table(bits) for bits in PAIR_BITS}
CODECS: dict[str, PageCodec] = {
    **{f"pairs of {bits} bits": PairCodec(table, has_mean=False) for bits, table in PAIRS.items()},
    **{f"pairs of {bits} bits, mean": PairCodec(table, has_mean=True) for bits, table in PAIRS.items()},
    "tree": PairCodec(tree_table(), has_mean=True),
    "coarse": CoarseCodec(tree_table(), has_mean=True),
    **{f"uniform {bits} by channel": UniformCodec(bits, "channel") for bits in (2, 3, 4, 8)},
    **{f"uniform {bits} by token": UniformCodec(bits, "token") for bits in (2, 3, 4, 8)},
}


def random_rows(seed: int, head_dim: int = 64, pages: int = 6) -> torch.Tensor:
    return torch.randn(pages, 64, head_dim, generator=torch.Generator().manual_seed(seed))


def error(codec: PageCodec, rows: torch.Tensor) -> float:
    return float((codec.decode(codec.encode(rows)) - rows).square().mean() / rows.square().mean())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bits_are_those_of_the_codes_and_of_a_byte_a_number(head_dim: int) -> None:
    rows = random_rows(1, head_dim)

    def bits(codec: PageCodec) -> float:
        return stored_bits(codec.encode(rows), rows.numel())

    page = 64 * head_dim
    for size, table in PAIRS.items():
        norms = 8 / head_dim + 32 / page
        assert bits(PairCodec(table, has_mean=False)) == pytest.approx(size / 2 + norms)
        assert bits(PairCodec(table, has_mean=True)) == pytest.approx(size / 2 + norms + 8 / 64 + 32 / page)
    assert bits(PairCodec(tree_table(), has_mean=False)) == bits(PairCodec(PAIRS[8], has_mean=False))
    assert bits(UniformCodec(4, "channel")) == pytest.approx(4 + 2 * (8 / 64 + 32 / page))
    assert bits(UniformCodec(4, "token")) == pytest.approx(4 + 2 * (8 / head_dim + 32 / page))


@given(st.integers(0, 2**31), st.sampled_from([64, 128]))
@settings(max_examples=10)
def test_more_bits_err_less(seed: int, head_dim: int) -> None:
    rows = random_rows(seed, head_dim)
    of_pairs = [error(PairCodec(PAIRS[bits], has_mean=True), rows) for bits in PAIR_BITS]
    assert of_pairs[0] > 3 * of_pairs[1] > 9 * of_pairs[2]
    for per in ("channel", "token"):
        of_levels = [error(UniformCodec(bits, per), rows) for bits in (2, 3, 4, 8)]
        assert of_levels == sorted(of_levels, reverse=True)
    # Four bits of a tree are worth nearly as much as four, two of it as two.
    coarse, tree = error(CoarseCodec(tree_table(), True), rows), error(PairCodec(tree_table(), True), rows)
    assert tree < 1.06 * of_pairs[2]
    assert coarse < 1.05 * of_pairs[0]


@pytest.mark.parametrize("name", CODECS)
def test_zero_rows_and_outliers(name: str) -> None:
    codec = CODECS[name]
    zeros = torch.zeros(2, 64, 64)
    assert torch.equal(codec.decode(codec.encode(zeros)), zeros)
    rows = random_rows(2)
    rows[0, 5] = 0  # one token
    rows[1, :, 7] = 0  # one channel
    rows[2, 9] *= 1e4  # a token as large as an attention sink's
    rows[3] *= 1e-4
    found = codec.decode(codec.encode(rows))
    assert bool(torch.isfinite(found).all())
    assert error(codec, rows[3:4]) < 0.5


def test_a_large_token_spares_its_page() -> None:
    """Norms are by token, so what is beside a sink keeps its precision; levels by channel lose it."""
    rows = random_rows(3, pages=1)
    rows[0, 9] *= 1e3
    others = torch.arange(64) != 9
    codec = PairCodec(PAIRS[8], has_mean=False)
    found = codec.decode(codec.encode(rows))
    assert float((found - rows)[0, others].square().mean()) < 0.02


def test_a_constant_is_stored_as_the_mean() -> None:
    rows = random_rows(4) * 0.01 + torch.linspace(-3, 3, 64)
    assert error(PairCodec(PAIRS[8], has_mean=True), rows) < 0.05 * error(PairCodec(PAIRS[8], has_mean=False), rows)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    rows = random_rows(5, pages=1)
    rows[0, 3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        CODECS[name].encode(rows)


@pytest.mark.parametrize("name", CODECS)
def test_pages_do_not_know_of_each_other(name: str) -> None:
    codec = CODECS[name]
    rows = random_rows(6)
    together = codec.decode(codec.encode(rows))
    alone = torch.stack([codec.decode(codec.encode(page)) for page in rows])
    assert float((together - alone).abs().max()) < 1e-5


@given(st.integers(0, 2**31))
@settings(max_examples=10)
def test_codes_are_the_nearest_pairs(seed: int) -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 2
    for table in PAIRS.values():
        distances = torch.cdist(values.view(-1, 2), table.levels)
        chosen = distances.gather(1, table.encode(values).long().view(-1, 1))[:, 0]
        assert torch.allclose(chosen, distances.amin(1), atol=1e-3)


def test_a_trees_codes_begin_with_the_coarser_ones() -> None:
    values, tree = torch.randn(8, 64), tree_table()
    assert torch.equal(tree.encode(values) >> 4, tree.coarse.encode(values))
