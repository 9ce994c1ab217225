"""Pools on a GPU seal pages that read back as those which the same pool seals on a CPU."""

import pytest
import torch

from anybit.kernels.attention_inputs import ExactPages
from anybit.kvcache.codec.balance import PageBasis
from anybit.kvcache.formats import parse_format
from anybit.kvcache.gpu_records import has_kernels, layer_records, sealed_records
from anybit.kvcache.pool import KVPool
from anybit.kvcache.sealed import SealedPages
from anybit.kvcache.sealed_pool import SealedPool, Seals
from anybit.kvcache.spec import KVSpec

SPEC = KVSpec(4, 2, 64, "qet4", {1: "uniform8", 2: "qet2+2/qet2"})
PAGES, FIRST_PAGES = torch.tensor([0, 4]), torch.tensor([5])
SEALS = torch.tensor([3, 1]), PAGES, torch.tensor([3]), FIRST_PAGES, torch.tensor([0, 1])


def seals(device):
    return Seals(*(ids.to(device) for ids in SEALS))


def filled(device):
    pool = KVPool(SPEC.of_format("bf16"), 4, device, {"qet4": SealedPool(SPEC, 6, device=device)})
    generator = torch.Generator().manual_seed(0)
    for layer in range(4):
        for part in (pool.keys(layer), pool.values(layer)):
            part[:4].copy_(torch.randn(4, 2, 64, 64, generator=generator) * 3 + 1)
    return pool


def check(on_gpu, on_cpu):
    for got, expected in zip(on_gpu, on_cpu, strict=True):
        for rows, wanted in zip(got.pages.read(PAGES.cuda()), expected.pages.read(PAGES), strict=True):
            assert (rows.cpu() - wanted).norm() <= 0.01 * wanted.norm()
        kept = zip(got.pages.read_exactly(FIRST_PAGES.cuda()), expected.pages.read_exactly(FIRST_PAGES), strict=True)
        for rows, wanted in kept:
            assert torch.equal(rows.cpu(), wanted)


@pytest.mark.gpu
def test_all_layers_read_back_as_on_the_cpu():
    on_gpu, on_cpu = filled("cuda"), filled("cpu")
    on_gpu.seal("qet4", seals("cuda"))
    on_cpu.seal("qet4", seals("cpu"))
    check(on_gpu.sealed["qet4"].layers, on_cpu.sealed["qet4"].layers)


@pytest.mark.gpu
def test_a_layer_alone_has_the_bytes_of_all_together():
    pool = filled("cuda")
    pool.seal("qet4", seals("cuda"))
    alone = SealedPool(SPEC, 6, device="cuda")
    for layer in range(4):
        alone.seal_layer(layer, pool.exact(layer), seals("cuda"))
    for together, apart in zip(pool.sealed["qet4"].layers, alone.layers, strict=True):
        assert torch.equal(together.pages.keys, apart.pages.keys)
        assert torch.equal(together.pages.values, apart.pages.values)


@pytest.mark.gpu
def test_own_pages_that_the_kernel_does_not_read_are_sealed_too():
    on_gpu, on_cpu = (SealedPool(SPEC, 6, device=device) for device in ("cuda", "cpu"))
    own = filled("cpu")
    for layer in range(4):
        exact = ExactPages(own.keys(layer).float(), own.values(layer).float())
        on_cpu.seal_layer(layer, exact, seals("cpu"))
        on_gpu.seal_layer(layer, ExactPages(exact.keys.cuda(), exact.values.cuda()), seals("cuda"))
    check(on_gpu.layers, on_cpu.layers)


@pytest.mark.parametrize("name", ["qet4", "qet2+2@2", "uniform8", "uniform8/qet4", "uniform4", "qet4/uniform2"])
def test_pages_are_described_where_keys_and_values_have_kernels(name):
    names = parse_format(name).names
    records = sealed_records(SealedPages(parse_format(name), 1, 1, 64), PageBasis(64))
    assert (records is not None) == all(has_kernels(part) for part in names)
    assert has_kernels(names[1]) == (names[1] not in ("uniform4", "uniform2"))


@pytest.mark.parametrize("name", ["qet4", "uniform8"])
def test_a_cpu_has_no_records_for_the_kernel(name):
    assert layer_records({0: SealedPages(KVSpec(1, 1, 64, name).kv_format(0), 1, 1, 64)}) is None
