"""Pools of sealed pages over all layers: what is sealed together is what each layer seals alone."""

import pytest
import torch

from anybit.kvcache.pool import KVPool
from anybit.kvcache.sealed_pool import SealedPool, Seals
from anybit.kvcache.spec import KVSpec

SPEC = KVSpec(num_layers=3, num_kv_heads=2, head_dim=32, format="qet4", layer_formats={1: "uniform8"})


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.fixture
def pool():
    filled = KVPool(SPEC.of_format("bf16"), 4, sealed={"qet4": SealedPool(SPEC, 6)})
    for layer in range(3):
        filled.keys(layer).copy_(normal(4, 2, 64, 32, seed=layer))
        filled.values(layer).copy_(normal(4, 2, 64, 32, seed=layer + 9))
    return filled


def test_all_layers_are_sealed_as_each_alone(pool):
    seals = Seals(ids(3, 1), ids(0, 4), ids(3), ids(5), ids(0, 1))
    alone = SealedPool(SPEC, 6)
    for index, layer in enumerate(alone.layers):
        layer.seal(pool.exact(index), seals)
    pool.seal("qet4", seals)
    for together, apart in zip(pool.sealed["qet4"].layers, alone.layers, strict=True):
        assert torch.equal(together.pages.keys, apart.pages.keys)
        assert torch.equal(together.pages.values, apart.pages.values)
        assert together.pages.keys[ids(0, 4, 5)].any()
        assert not together.pages.keys[ids(1, 2, 3)].any()


def test_layers_have_formats_of_their_own(pool):
    sealed = pool.sealed["qet4"]
    sizes = [layer.pages.keys.shape[-1] + layer.pages.values.shape[-1] for layer in sealed.layers]
    assert sizes[0] == sizes[2] < sizes[1]
    assert SPEC.page_bytes == 2 * sum(sizes)
    assert SPEC.bytes_per_token == SPEC.page_bytes / 64


def test_seals_are_taken_page_by_page():
    seals = Seals(ids(7, 8, 9), ids(1, 2, 3), ids(7), ids(0), ids(0, 1, 0))
    first, second = seals.of_number(0), seals.of_number(1)
    assert first is not None
    assert second is not None
    assert (first.slots.tolist(), first.page_ids.tolist(), first.first_slots.tolist()) == ([7, 9], [1, 3], [7])
    assert (second.slots.tolist(), second.page_ids.tolist(), second.first_slots.tolist()) == ([8], [2], [])
    assert seals.of_number(2) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pages_that_are_not_finite_are_read_as_such_and_harm_no_other(pool, bad):
    pool.keys(0)[1, 1, 5, 7] = bad
    pool.values(2)[3, 0, 5, 7] = bad
    pool.seal("qet4", Seals(ids(3, 1), ids(0, 4), ids(), ids(), ids(0, 0)))
    found = [layer.pages.read(ids(0, 4)) for layer in pool.sealed["qet4"].layers]
    bad_keys = [torch.isnan(keys).flatten(2).all(2).tolist() for keys, _ in found]
    bad_values = [torch.isnan(values).flatten(2).all(2).tolist() for _, values in found]
    none = [[False, False], [False, False]]
    assert bad_keys == [[[False, False], [False, True]], none, none]
    assert bad_values == [none, none, [[True, False], [False, False]]]
