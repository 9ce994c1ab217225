"""Pages that the GPU seals against those of PyTorch's encoder: they differ only where a number rounds to the other side."""

import pytest
import torch

from anybit.kernels.attention_inputs import ExactPages
from anybit.kernels.cuda.seal import PageSeals, can_seal, seal_pages
from anybit.kvcache.codec.metadata import decode_linear, decode_log
from anybit.kvcache.codec.packing import unpack_codes
from anybit.kvcache.codec.pages import UniformCodec
from anybit.kvcache.formats import parse_format
from anybit.kvcache.gpu_records import layer_records
from anybit.kvcache.sealed import SealedPages

pytestmark = pytest.mark.gpu

FORMATS = [
    *("qet4", "qet3", "qet2", "qet2+2", "qet2+2@2", "qet4/qet2", "qet2/qet3"),
    *("uniform8", "uniform8/qet4", "qet2/uniform8"),
]
LAYERS, SLOTS, PAGES, KV_HEADS = 3, 5, 7, 2
UNTOUCHED = 7  # a byte
CHOSEN = torch.tensor([3, 0, 4, 1]), torch.tensor([1, 6, 3, 0])
FIRSTS = torch.tensor([0, 3]), torch.tensor([4, 5])
NONE = torch.tensor([], dtype=torch.int64)


def own_pages(head_dim, seed=0):
    """[layers, keys and values, slots, kv_heads, 64, head_dim], each page with its own kind of trouble."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    pool = normal(LAYERS, 2, SLOTS, KV_HEADS, 64, head_dim) * normal(LAYERS, 2, SLOTS, KV_HEADS, 64, 1).abs()
    pool[:, 0] += 8 * normal(LAYERS, 1, KV_HEADS, 1, head_dim)
    pool[0, :, 0, 0, 5] = 0
    pool[0, :, 0, 1] = 0
    pool[1, :, 3, 0, 9, 11] = 300
    pool[1, :, 3, 1, :, 3] += 1000
    pool[2, :, 4, 0] *= 1e-3
    pool[2, :, 1, 0, 9, 9] = torch.nan
    pool[2, :, 1, 1, 63, head_dim - 1] = -torch.inf
    return pool.bfloat16()


def seal(name, pool, slots, page_ids, first_slots=NONE, first_page_ids=NONE):
    """Layers' pages on the CPU, sealed by the GPU."""
    kv_format, head_dim = parse_format(name), pool.shape[-1]
    # Not in order, as layers that have a format in common may lie among others.
    layers = {layer: SealedPages(kv_format, PAGES, KV_HEADS, head_dim, "cuda") for layer in (2, 0, 1)}
    for pages in layers.values():
        for records in (pages.keys, pages.values):
            records.fill_(UNTOUCHED)
    records = layer_records(layers)
    assert records is not None
    on_gpu = pool.cuda()
    places = (ids.cuda() for ids in (slots, page_ids, first_slots, first_page_ids))
    exact_tokens = layers[0].exact_tokens
    seal_pages(ExactPages(on_gpu[:, 0], on_gpu[:, 1]), records, PageSeals(*places, exact_tokens))
    return [on_cpu(layers[layer], kv_format, head_dim) for layer in range(LAYERS)]


def on_cpu(pages, kv_format, head_dim):
    copied = SealedPages(kv_format, PAGES, KV_HEADS, head_dim)
    copied.keys.copy_(pages.keys)
    copied.values.copy_(pages.values)
    return copied


def seal_on_cpu(name, pool):
    layers = [SealedPages(parse_format(name), PAGES, KV_HEADS, pool.shape[-1]) for _ in range(LAYERS)]
    for pages, own in zip(layers, pool, strict=True):
        pages.seal(CHOSEN[1], *(part[CHOSEN[0]] for part in own))
        pages.keep_exactly(FIRSTS[1], *(part[FIRSTS[0]] for part in own))
    return layers


def fields_of(pages, part):
    codec, records = pages.codecs[part], (pages.keys, pages.values)[part]
    bits = codec.bits if isinstance(codec, UniformCodec) else codec.table.bits
    fields = codec.layout(pages._head_dim).unpack(records[CHOSEN[1]])
    return {**fields, "codes": unpack_codes(fields["codes"], bits)}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", FORMATS)
def test_records_are_those_of_the_encoder(name, head_dim):
    pool = own_pages(head_dim)
    for layer, (got, expected) in enumerate(
        zip(seal(name, pool, *CHOSEN, *FIRSTS), seal_on_cpu(name, pool), strict=True)
    ):
        for part in range(2):
            own = pool[layer, part, CHOSEN[0]].float()
            is_finite = own.isfinite().flatten(2).all(2)
            read, wanted = (pages.read(CHOSEN[1])[part] for pages in (got, expected))
            assert bool((read.isnan().flatten(2).all(2) == ~is_finite).all())
            error, least = ((rows - own)[is_finite].flatten(1).norm(dim=1) for rows in (read, wanted))
            assert bool((error <= 1.001 * least).all())
            fields, wanted_fields = (fields_of(pages, part) for pages in (got, expected))
            assert (fields["codes"] == wanted_fields["codes"])[is_finite].float().mean() >= 0.999
            check_metadata(fields, wanted_fields, is_finite)


def check_metadata(fields, wanted, is_finite):
    """Within a step, and what rounding does to a range. Minima do not depend on rounding: they are the same."""
    for name, page_range in (("norms", "norm_range"), ("steps", "step_range")):
        if name in fields:
            sizes, wanted_sizes = (decode_log(part[name], part[page_range])[is_finite] for part in (fields, wanted))
            step = torch.exp2(wanted[page_range][is_finite][:, 1:].float()) - 1
            assert bool(((sizes - wanted_sizes).abs() <= wanted_sizes * (step + 2e-3)).all())
    if "mean" in fields:
        means, wanted_means = (decode_linear(part["mean"], part["mean_range"])[is_finite] for part in (fields, wanted))
        step = wanted["mean_range"][is_finite][:, 1:].float()
        assert bool(((means - wanted_means).abs() <= 1.01 * step + 2e-3 * wanted_means.abs()).all())
    for name in {"minima", "minimum_range"} & fields.keys():
        assert torch.equal(fields[name][is_finite], wanted[name][is_finite])


@pytest.mark.parametrize("name", ["qet4", "qet2", "qet4/qet2", "uniform8", "qet2/uniform8"])
def test_first_tokens_are_kept_and_no_other_byte_is_written(name):
    pool = own_pages(128)
    for layer, (got, expected) in enumerate(
        zip(seal(name, pool, *CHOSEN, *FIRSTS), seal_on_cpu(name, pool), strict=True)
    ):
        kept = got.exact_tokens * pool.shape[-1] * pool.element_size()
        for part, (rows, wanted) in enumerate(
            zip(got.read_exactly(FIRSTS[1]), expected.read_exactly(FIRSTS[1]), strict=True)
        ):
            assert torch.equal(rows, wanted)
            assert torch.equal(rows, pool[layer, part, FIRSTS[0], :, : got.exact_tokens].float())
            records = (got.keys, got.values)[part]
            assert bool((records[FIRSTS[1], :, kept:] == UNTOUCHED).all())
            assert bool((records[2] == UNTOUCHED).all())


@pytest.mark.parametrize("name", FORMATS)
def test_a_page_has_the_same_bytes_alone(name):
    pool = own_pages(64)
    together = seal(name, pool, *CHOSEN, *FIRSTS)
    for slot, page_id in zip(*CHOSEN, strict=True):
        alone = seal(name, pool, slot[None], page_id[None])
        for pages, apart in zip(together, alone, strict=True):
            assert torch.equal(pages.keys[page_id], apart.keys[page_id])
            assert torch.equal(pages.values[page_id], apart.values[page_id])


def test_nothing_to_seal_writes_nothing():
    for pages in seal("qet4", own_pages(64), NONE, NONE):
        assert bool((pages.keys == UNTOUCHED).all())


def test_own_pages_have_to_lie_as_the_kernel_reads_them():
    with pytest.raises(ValueError, match="contiguous"):
        seal("qet4", own_pages(64).transpose(3, 4).contiguous().transpose(3, 4), *CHOSEN)


def test_what_it_can_seal():
    device = torch.device("cuda")
    assert can_seal(torch.bfloat16, 128, device)
    assert not can_seal(torch.float32, 128, device)
    assert not can_seal(torch.bfloat16, 96, device)
    assert not can_seal(torch.bfloat16, 128, torch.device("cpu"))
