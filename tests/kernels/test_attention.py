"""Paged attention against the oracle, and the promise that a query's result depends on its own keys alone."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.kernels import dispatch, fallbacks, reference
from anybit.kernels.portable import attention, matmul
from tests.fixtures.nested import normal

PAGE_SIZE = 64
HEADS = [(4, 4), (4, 2), (9, 3), (8, 1)]


@dataclass
class Cache:
    """Pages full of noise and one block table per sequence, in no order; what lies beyond a position is stale."""

    keys: torch.Tensor
    values: torch.Tensor
    tables: list[list[int]]

    def table(self, *sequences: int) -> torch.Tensor:
        """Tables of equal length, padded with the first sequence's last page."""
        rows = [self.tables[index] for index in sequences]
        longest = max(map(len, rows))
        return torch.tensor([row + [self.tables[0][-1]] * (longest - len(row)) for row in rows])

    def attend(self, q: torch.Tensor, positions: torch.Tensor, tables: torch.Tensor, **options: Any) -> torch.Tensor:
        return dispatch.paged_attention(q, self.keys, self.values, tables, positions, q.shape[-1] ** -0.5, **options)

    def expect(self, q: torch.Tensor, positions: torch.Tensor, tables: torch.Tensor, **options: Any) -> torch.Tensor:
        return reference.paged_attention(q, self.keys, self.values, tables, positions, q.shape[-1] ** -0.5, **options)


def make_cache(lengths, kv_heads, head_dim, dtype=torch.bfloat16, page_size=PAGE_SIZE, seed=0):
    counts = [-(-length // page_size) for length in lengths]
    shape = (sum(counts) + 2, kv_heads, page_size, head_dim)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(shape[0], generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    return Cache(normal(*shape, seed=seed).to(dtype), normal(*shape, seed=seed + 1).to(dtype), tables)


def up_to(length):
    return torch.arange(length)[None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_is_near_the_oracle_in_prefill(heads, kv_heads, head_dim, dtype):
    cache = make_cache([70], kv_heads, head_dim, dtype)
    q = normal(1, 70, heads, head_dim)
    assert torch.allclose(
        cache.attend(q, up_to(70), cache.table(0)), cache.expect(q, up_to(70), cache.table(0)), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_is_near_the_oracle_in_decode(heads, kv_heads, dtype):
    lengths = [1, 63, 64, 65, 200]
    cache = make_cache(lengths, kv_heads, 64, dtype)
    q, positions = normal(5, 1, heads, 64), torch.tensor(lengths)[:, None] - 1
    tables = cache.table(0, 1, 2, 3, 4)
    assert torch.allclose(cache.attend(q, positions, tables), cache.expect(q, positions, tables), rtol=0, atol=2e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 30, 64, 100, 1000])
def test_attention_sees_no_further_than_its_window_and_caps_its_scores(window, softcap):
    cache = make_cache([150], 2, 32)
    q, options = normal(1, 150, 4, 32), {"window": window, "softcap": softcap}
    got, expected = (f(q, up_to(150), cache.table(0), **options) for f in (cache.attend, cache.expect))
    assert torch.allclose(got, expected, rtol=0, atol=4e-6)
    alone = cache.attend(q[:, 149:], torch.tensor([[149]]), cache.table(0), **options)
    assert torch.equal(alone[:, 0], got[:, 149])


@pytest.mark.parametrize("page_size", [8, 16, 64])
def test_attention_works_for_other_page_sizes_and_sharp_scores(page_size):
    cache = make_cache([50], 2, 32, torch.float32, page_size)
    q = 30 * normal(1, 50, 4, 32)
    got, expected = (f(q, up_to(50), cache.table(0)) for f in (cache.attend, cache.expect))
    assert torch.allclose(got, expected, rtol=0, atol=2e-4)  # scores near 100 are known to 1e-5


def test_attention_in_bfloat16_rounds_the_float32_result():
    cache = make_cache([70], 2, 64)
    q = normal(1, 70, 4, 64).bfloat16()
    got = cache.attend(q, up_to(70), cache.table(0))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, cache.attend(q.float(), up_to(70), cache.table(0)).bfloat16())


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(HEADS),
    st.sampled_from((16, 64)),
    st.integers(2, 150),
    st.sets(st.integers(1, 149), max_size=6),
    st.integers(0, 999),
)
def test_chunk_borders_change_no_bit(heads, head_dim, length, borders, seed):
    cache = make_cache([length], heads[1], head_dim, seed=seed)
    q = normal(1, length, heads[0], head_dim, seed=seed)
    whole = cache.attend(q, up_to(length), cache.table(0))
    ends = [*sorted(border for border in borders if border < length), length]
    for start, stop in zip([0, *ends], ends, strict=False):
        chunk = cache.attend(q[:, start:stop], up_to(length)[:, start:stop], cache.table(0))
        assert torch.equal(chunk, whole[:, start:stop])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_token_by_token_gives_the_bits_of_the_whole(heads, kv_heads, threads):
    torch.set_num_threads(threads)
    cache = make_cache([140], kv_heads, 64)
    q = normal(1, 140, heads, 64)
    whole = cache.attend(q, up_to(140), cache.table(0))
    for position in range(0, 140, 9 if threads > 1 else 1):
        one = slice(position, position + 1)
        tables = cache.table(0)[:, : position // PAGE_SIZE + 1]
        assert torch.equal(cache.attend(q[:, one], up_to(140)[:, one], tables), whole[:, one])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(HEADS),
    st.lists(st.integers(1, 200), min_size=2, max_size=6),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(0, 999),
)
def test_batch_mates_and_padding_pages_change_no_bit(heads, lengths, tokens, extra_pages, seed):
    lengths = [max(length, tokens) for length in lengths]
    cache = make_cache(lengths, heads[1], 32, seed=seed)
    q = normal(len(lengths), tokens, heads[0], 32, seed=seed)
    positions = torch.tensor(lengths)[:, None] - tokens + torch.arange(tokens)
    tables = cache.table(*range(len(lengths)))
    tables = torch.cat((tables, tables[:, :1].expand(-1, extra_pages)), 1)
    together = cache.attend(q, positions, tables)
    for index in range(len(lengths)):
        one = slice(index, index + 1)
        assert torch.equal(cache.attend(q[one], positions[one], cache.table(index)), together[one])


def test_stale_numbers_beyond_a_position_change_no_bit():
    cache = make_cache([100], 2, 64)
    q, position = normal(1, 1, 4, 64), torch.tensor([[80]])
    expected = cache.attend(q, position, cache.table(0))
    for pages in (cache.keys, cache.values):
        pages[cache.tables[0][1], :, 81 - PAGE_SIZE :] = 1e30
        others = [page for page in range(len(pages)) if page not in cache.tables[0]]
        pages[others] = -1e30
    assert torch.equal(cache.attend(q, position, cache.table(0)), expected)


def test_query_tiles_change_no_bit(monkeypatch):
    cache = make_cache([130], 2, 64)
    q = normal(1, 130, 4, 64)
    expected = cache.attend(q, up_to(130), cache.table(0))
    for tile in (1, 7, 130):
        monkeypatch.setattr(attention, "_QUERY_TILE", tile)
        assert torch.equal(cache.attend(q, up_to(130), cache.table(0)), expected)


def test_query_that_is_not_finite_spoils_its_own_result_and_no_other():
    cache = make_cache([70, 20], 2, 64)
    q, positions = normal(2, 3, 4, 64), torch.tensor([[67, 68, 69], [17, 18, 19]])
    expected = cache.attend(q, positions, cache.table(0, 1))
    q[0, 1, 2, 5] = torch.nan
    got = cache.attend(q, positions, cache.table(0, 1))
    assert torch.isnan(got[0, 1, 2]).all()
    got[0, 1, 2] = expected[0, 1, 2]
    assert torch.equal(got, expected)


@pytest.fixture
def dependent_rows(monkeypatch):
    """A machine whose BLAS gives a row other bits in other company."""
    monkeypatch.setattr(matmul, "_rows_are_independent", lambda *_: False)


@pytest.mark.usefixtures("dependent_rows")
def test_row_by_row_fallback_is_near_the_oracle_and_is_counted():
    cache = make_cache([70, 9], 2, 32)
    q, positions = normal(2, 2, 4, 32), torch.tensor([[68, 69], [7, 8]])
    before = sum(count for key, count in fallbacks.snapshot().items() if key.startswith("batched_matmul:"))
    got = cache.attend(q, positions, cache.table(0, 1))
    after = sum(count for key, count in fallbacks.snapshot().items() if key.startswith("batched_matmul:"))
    assert torch.allclose(got, cache.expect(q, positions, cache.table(0, 1)), rtol=0, atol=2e-6)
    assert after == before + 2  # scores and weighted values


@pytest.mark.usefixtures("dependent_rows")
def test_row_by_row_fallback_gives_a_row_the_same_bits_in_any_batch():
    left, right = normal(3, 16, 24), normal(3, 24, 8)
    whole = matmul.batched_matmul(left, right)
    assert torch.allclose(whole, left @ right, rtol=0, atol=1e-5)
    assert torch.equal(matmul.batched_matmul(left[1:2, 8:], right[1:2]), whole[1:2, 8:])
    rolled = matmul.batched_matmul(left.roll(5, 1), right)
    assert torch.equal(rolled, whole.roll(5, 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("inner", "columns"), [(16, 64), (64, 64), (64, 16), (128, 64), (64, 128)])
def test_batched_matmul_gives_a_row_the_same_bits_in_any_batch(inner, columns, transposed):
    left = normal(5, 48, inner)
    right = normal(5, columns, inner).transpose(1, 2) if transposed else normal(5, inner, columns)
    whole = matmul.batched_matmul(left, right)
    for rows in (8, 24, 40):
        for batch in (1, 2, 4):
            part = matmul.batched_matmul(left[1 : 1 + batch, 8 : 8 + rows].contiguous(), right[1 : 1 + batch])
            assert torch.equal(part, whole[1 : 1 + batch, 8 : 8 + rows])


def probe() -> bool:
    return matmul._rows_are_independent.__wrapped__(16, 8, False, torch.float32, torch.device("cpu"), 1)


def test_probe_notices_rows_that_depend_on_their_number(monkeypatch):
    exact = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda left, right: exact(left, right) * (1 + 1e-6 * (left.shape[1] == 8)))
    assert not probe()


def test_probe_notices_rows_that_depend_on_their_position(monkeypatch):
    exact = torch.bmm

    def positioned(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        out = exact(left, right)
        out[:, :5] *= 1 + 1e-6
        return out

    monkeypatch.setattr(torch, "bmm", positioned)
    assert not probe()


def test_probe_accepts_rows_computed_one_by_one(monkeypatch):
    monkeypatch.setattr(torch, "bmm", lambda left, right: (left.unsqueeze(3) * right.unsqueeze(1)).cumsum(2)[:, :, -1])
    assert probe()
