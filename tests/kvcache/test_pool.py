"""What a page costs, and where the pool puts each token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.kvcache.formats import EXACT_FORMATS
from anybit.kvcache.pool import KVPool
from anybit.kvcache.spec import PAGE_SIZE, KVSpec

SPEC = KVSpec(num_layers=2, num_kv_heads=3, head_dim=4, format="float32")


def tokens(count: int, spec: KVSpec = SPEC, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, count, spec.num_kv_heads, spec.head_dim)
    keys, values = torch.randn(shape, generator=generator)
    return keys, values


@pytest.mark.parametrize(
    ("kv_format", "dtype", "bytes_per_token"),
    [
        ("bf16", torch.bfloat16, 2 * 30 * 3 * 64 * 2),  # keys and values, SmolLM2-135M: 23,040 bytes a token
        ("float32", torch.float32, 2 * 30 * 3 * 64 * 4),
    ],
)
def test_spec_counts_the_bytes_of_keys_and_values_over_all_layers(kv_format, dtype, bytes_per_token):
    spec = KVSpec(num_layers=30, num_kv_heads=3, head_dim=64, format=kv_format)
    assert spec.dtype == dtype
    assert spec.bytes_per_token == bytes_per_token
    assert spec.page_bytes == 64 * bytes_per_token


@pytest.mark.parametrize(("num_tokens", "pages"), [(0, 0), (1, 2), (64, 2), (65, 3)])
def test_sealed_formats_have_one_page_more_for_the_first_tokens(num_tokens, pages):
    assert SPEC.of_format("qet4").pages_for(num_tokens) == pages


@pytest.mark.parametrize(("num_tokens", "pages"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_pages_for_rounds_up(num_tokens, pages):
    assert PAGE_SIZE == 64
    assert SPEC.pages_for(num_tokens) == pages


@pytest.mark.parametrize("kv_format", EXACT_FORMATS)
def test_pool_starts_with_zeros_and_takes_what_its_pages_cost(kv_format):
    spec = KVSpec(2, 3, 4, kv_format)
    pool = KVPool(spec, 5)
    tensors = [part(layer) for layer in range(2) for part in (pool.keys, pool.values)]
    assert all(tensor.shape == (5, 3, PAGE_SIZE, 4) for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) == 5 * spec.page_bytes
    assert not any(tensor.any() for tensor in tensors)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, PAGE_SIZE - 1)), min_size=1, max_size=20), st.integers(0, 1))
def test_write_puts_every_token_where_it_belongs_and_nothing_elsewhere(slots, layer):
    pool = KVPool(SPEC, 4)
    places = list(slots)
    keys, values = tokens(len(places))
    pool.write(layer, *torch.tensor(places).T, keys, values)
    for (page, offset), key, value in zip(places, keys, values, strict=True):
        assert torch.equal(pool.keys(layer)[page, :, offset], key)
        assert torch.equal(pool.values(layer)[page, :, offset], value)
    written = (pool.keys(layer) != 0).any(3).any(1)
    assert {tuple(place) for place in written.nonzero().tolist()} == slots
    assert not pool.keys(1 - layer).any()
    assert not pool.values(1 - layer).any()


def test_write_replaces_what_a_page_held():
    pool = KVPool(SPEC, 2)
    place = (torch.tensor([1]), torch.tensor([63]))
    pool.write(0, *place, *tokens(1))
    keys, values = tokens(1, seed=1)
    pool.write(0, *place, keys, values)
    assert torch.equal(pool.keys(0)[1, :, 63], keys[0])
    assert torch.equal(pool.values(0)[1, :, 63], values[0])


def test_write_rounds_to_bfloat16():
    spec = KVSpec(2, 3, 4, "bf16")
    pool = KVPool(spec, 1)
    keys, values = tokens(2, spec)
    keys[0, 0, :2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # ties go to the even neighbour
    pool.write(1, torch.zeros(2, dtype=torch.int64), torch.arange(2), keys, values)
    assert pool.keys(1)[0, 0, 0, :2].tolist() == [1.0, 1 + 2**-6]
    assert torch.equal(pool.values(1)[0, :, 1], values[1].bfloat16())
    assert (pool.values(1)[0, :, 1].float() - values[1]).abs().max() <= 2**-8 * values.abs().max()


def test_pools_share_no_memory():
    first, second = KVPool(SPEC, 1), KVPool(SPEC, 1)
    first.keys(0).fill_(1)
    assert not second.keys(0).any()
