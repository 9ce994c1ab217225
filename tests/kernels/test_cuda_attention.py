"""The GPU's attention against the oracle, and the promise that a query's result depends on its own keys alone."""

import pytest
import torch

from anybit.kernels import dispatch, fallbacks, reference
from anybit.kernels.cuda.attention import attend_splits, paged_attention
from anybit.kernels.cuda.heads import RowPlaces
from tests.fixtures.nested import normal
from tests.fixtures.projection import apart, random_projection

pytestmark = pytest.mark.gpu

HEADS = [(4, 4), (9, 3), (32, 8), (8, 1), (24, 1)]


class Cache:
    """Pages of noise in no order, among them some that are not finite and belong to nobody, and tables of sequences."""

    def __init__(self, lengths, kv_heads, head_dim):
        counts = [-(-length // 64) for length in lengths]
        shape = (sum(counts) + 2, kv_heads, 64, head_dim)
        self.keys, self.values = normal(*shape, seed=1).bfloat16(), normal(*shape, seed=2).bfloat16()
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        for table, length in zip(self.tables, lengths, strict=True):
            self.values[table[-1], :, (length - 1) % 64 + 1 :] = torch.nan
        self.lengths = lengths

    def table(self, extra=0):
        longest = max(map(len, self.tables)) + extra
        return torch.tensor([table + [table[0]] * (longest - len(table)) for table in self.tables])

    def attend(self, q, positions, tables, **options):
        scale = q.shape[-1] ** -0.5
        on_gpu = [tensor.cuda() for tensor in (q, self.keys, self.values, tables, positions)]
        return paged_attention(*on_gpu, scale, **options).cpu()

    def expect(self, q, positions, tables, **options):
        values = self.values.nan_to_num(0)
        return reference.paged_attention(q, self.keys, values, tables, positions, q.shape[-1] ** -0.5, **options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_a_token_of_each_sequence_is_near_the_oracle(heads, kv_heads, head_dim):
    lengths = [1, 63, 64, 65, 127, 128, 129, 700]
    cache = Cache(lengths, kv_heads, head_dim)
    q, positions = normal(len(lengths), 1, heads, head_dim), torch.tensor(lengths)[:, None] - 1
    got, expected = (f(q, positions, cache.table()) for f in (cache.attend, cache.expect))
    assert torch.allclose(got, expected, rtol=0, atol=3e-5)
    padded = cache.attend(q, positions, cache.table(extra=5))
    assert torch.equal(padded, got)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_a_prompt_is_near_the_oracle_and_its_tokens_alone_give_the_same_bits(heads, kv_heads, head_dim):
    cache = Cache([300], kv_heads, head_dim)
    q, positions = normal(1, 300, heads, head_dim), torch.arange(300)[None]
    got, expected = (f(q, positions, cache.table()) for f in (cache.attend, cache.expect))
    assert torch.allclose(got, expected, rtol=0, atol=3e-5)
    for token in (0, 63, 64, 127, 128, 255, 256, 299):
        alone = cache.attend(q[:, token : token + 1], positions[:, token : token + 1], cache.table())
        assert torch.equal(alone[:, 0], got[:, token])
    chunk = cache.attend(q[:, 101:230], positions[:, 101:230], cache.table())
    assert torch.equal(chunk, got[:, 101:230])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 30, 64, 128, 200, 1000])
def test_attention_sees_no_further_than_its_window_and_caps_its_scores(window, softcap):
    cache, options = Cache([400], 2, 64), {"window": window, "softcap": softcap}
    q, positions = normal(1, 400, 8, 64), torch.arange(400)[None]
    got, expected = (f(q, positions, cache.table(), **options) for f in (cache.attend, cache.expect))
    assert torch.allclose(got, expected, rtol=0, atol=4e-5)
    for token in (0, 130, 256, 399):
        alone = cache.attend(q[:, token : token + 1], positions[:, token : token + 1], cache.table(), **options)
        assert torch.equal(alone[:, 0], got[:, token])


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_heads_as_projected_give_the_same_bits(heads, kv_heads, head_dim, dtype, has_norms):
    lengths = [1, 63, 64, 65, 129, 256, 257, 700]
    cache = Cache(lengths, kv_heads, head_dim)
    positions = torch.tensor(lengths)[:, None] - 1
    places = RowPlaces(positions[:, 0], torch.tensor([table[-1] for table in cache.tables]), positions[:, 0] % 64)
    on_gpu = RowPlaces(*(part.cuda() for part in (places.positions, places.page_ids, places.page_offsets)))
    pages = cache.keys.cuda(), cache.values.cuda()
    projected = random_projection(heads, on_gpu, pages, dtype, has_norms)
    queries, copies = apart(projected)
    tables, positions = cache.table(extra=3).cuda(), positions.cuda()
    for window in (None, 70):
        rest = (tables, positions, head_dim**-0.5, window)
        expected = attend_splits(queries, copies.k_pages, copies.v_pages, *rest).merged()
        assert torch.equal(attend_splits(projected, *pages, *rest).merged(), expected)
        assert all(
            torch.equal(page.nan_to_num(9), copy.nan_to_num(9))
            for page, copy in zip(pages, (copies.k_pages, copies.v_pages), strict=True)
        )


def test_sequences_to_be_left_alone_are_not_written_either():
    cache = Cache([100, 100], 2, 64)
    positions = torch.tensor([99, 99])
    places = RowPlaces(
        *(part.cuda() for part in (positions, torch.tensor([table[-1] for table in cache.tables]), positions % 64))
    )
    pages = cache.keys.cuda(), cache.values.cuda()
    projected = random_projection(4, places, pages, torch.bfloat16)
    attended = attend_splits(projected, *pages, cache.table().cuda(), torch.tensor([[99], [-1]]).cuda(), 0.125)
    out = torch.full((2, 1, 4, 64), 7.0, dtype=torch.bfloat16, device="cuda")
    attended.merged(out)
    assert (out[1] == 7).all()
    assert not (out[0] == 7).any()
    other = cache.tables[1][-1]
    assert torch.equal(pages[0][other].cpu(), cache.keys[other])
    assert not torch.equal(pages[0][cache.tables[0][-1]].cpu(), cache.keys[cache.tables[0][-1]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_round_the_float32_result(dtype):
    cache = Cache([200], 2, 128)
    q, positions = normal(1, 200, 8, 128).to(dtype), torch.arange(200)[None]
    assert torch.equal(
        cache.attend(q, positions, cache.table()), cache.attend(q.float(), positions, cache.table()).to(dtype)
    )


def test_numbers_that_are_not_finite_stay_with_their_row():
    cache = Cache([100, 100], 2, 64)
    q, positions = normal(2, 1, 4, 64), torch.tensor([[99], [99]])
    healthy = cache.attend(q, positions, cache.table())
    q[0, 0, 1, 3] = torch.inf
    got = cache.attend(q, positions, cache.table())
    assert torch.equal(got[1], healthy[1])
    assert not got[0, 0, 1].isfinite().any()
    assert torch.equal(got[0, 0, [0, 2, 3]], healthy[0, 0, [0, 2, 3]])


def test_no_path_is_counted_as_slower():
    before = fallbacks.snapshot()
    cache = Cache([10], 2, 64)
    q, keys, values, tables = (t.cuda() for t in (normal(1, 10, 4, 64), cache.keys, cache.values, cache.table()))
    positions = torch.arange(10, device="cuda")[None]
    dispatch.paged_attention(q, keys, values, tables, positions, 0.125)
    assert fallbacks.snapshot() == before
    dispatch.paged_attention(q, keys.float(), values.float(), tables, positions, 0.125)
    assert fallbacks.snapshot() != before
