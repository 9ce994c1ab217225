"""Pages sealed natively are those that PyTorch's encoder makes, but for what rounds to the other side."""

import pytest
import torch

from anybit.engine.models.native_sealed import describe_layer
from anybit.kernels.cpu import bindings
from anybit.kernels.cpu.stack import LayerStack, StackPages, StackShape
from anybit.kvcache.codec.balance import PageBasis
from anybit.kvcache.formats import parse_format
from anybit.kvcache.sealed import SealedPages
from anybit.kvcache.sealed_pool import SealedLayer
from tests.fixtures.native import native_only

pytestmark = native_only
FORMATS = ("qet4", "qet3", "qet2", "qet2+2", "qet2+2@2", "qet4/qet2")
EXACT_PAGES, SEALED_PAGES = torch.tensor([2, 0]), torch.tensor([1, 3])


def sealed_layer(kv_format, head_dim):
    return SealedLayer(SealedPages(parse_format(kv_format), 4, 2, head_dim), PageBasis(head_dim))


def seal_natively(layer, keys, values):
    """Pages EXACT_PAGES of [pages, 2, 64, head_dim] to SEALED_PAGES of the layer."""
    shape = StackShape(64, 64, 4, 2, keys.shape[-1], "silu", 1e-5, 1.0, None)
    stack = LayerStack(shape, [])
    stack._model.num_layers = 1  # sealing looks at pages alone
    pages = stack.describe_pages([StackPages(keys, values, [describe_layer(layer)])])
    stack.seal(EXACT_PAGES, SEALED_PAGES, 0, pages)


def inputs(head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 3, 2, 64, head_dim, generator=generator)
    keys = keys * torch.rand(3, 2, 64, 1, generator=generator) * 5 + 3 * torch.randn(head_dim, generator=generator)
    values[0, 1, 5] = 0
    values[2, 0] *= 1e-3
    return keys.to(dtype), values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_native_records_are_those_of_the_encoder(kv_format, head_dim, dtype):
    native, expected = sealed_layer(kv_format, head_dim), sealed_layer(kv_format, head_dim)
    keys, values = inputs(head_dim, dtype)
    seal_natively(native, keys, values)
    expected.pages.seal(SEALED_PAGES, keys[EXACT_PAGES], values[EXACT_PAGES])
    for got, wanted, codec in zip(native.pages._records, expected.pages._records, native.pages.codecs, strict=True):
        assert (got != wanted).float().mean() < 2e-3
        layout = codec.layout(head_dim)
        for name, field in layout.unpack(got[SEALED_PAGES]).items():
            if field.dtype == torch.float16:
                assert torch.allclose(field, layout.unpack(wanted[SEALED_PAGES])[name], rtol=2e-3)
    for got, wanted in zip(native.pages.read(SEALED_PAGES), expected.pages.read(SEALED_PAGES), strict=True):
        # A pair between two clusters may go to either; both are as near.
        assert (got - wanted).norm() / wanted.norm() < 0.01


@pytest.mark.parametrize("kv_format", FORMATS)
def test_every_instruction_set_seals_alike(kv_format):
    keys, values = inputs(64, torch.bfloat16, seed=1)
    found = []
    for name in bindings.instruction_sets():
        bindings.select_instruction_set(name)
        layer = sealed_layer(kv_format, 64)
        seal_natively(layer, keys, values)
        found.append((layer.pages.keys, layer.pages.values))
    bindings.select_instruction_set(bindings.instruction_sets()[0])
    assert all(torch.equal(keys, found[0][0]) and torch.equal(values, found[0][1]) for keys, values in found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_pages_that_are_not_finite_are_read_as_such(bad):
    layer = sealed_layer("qet4", 64)
    keys, values = inputs(64, torch.bfloat16)
    keys[2, 1, 7, 9] = bad
    values[0, 0, 3, 1] = bad
    seal_natively(layer, keys, values)
    is_nan = [torch.isnan(part).flatten(2).all(2).tolist() for part in layer.pages.read(SEALED_PAGES)]
    assert is_nan == [[[False, True], [False, False]], [[False, False], [True, False]]]
    for part, (page, head) in zip(layer.pages.read(SEALED_PAGES), [(0, 0), (0, 1)], strict=True):
        assert torch.isfinite(part[page, head]).all()
