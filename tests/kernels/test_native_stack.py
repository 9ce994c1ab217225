"""All layers in one native call, against the portable layers and on every instruction set."""

import json
from dataclasses import replace

import pytest
import torch

from anybit.engine.quantize.run import QuantizeOptions, quantize
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import NestedLoader
from anybit.kernels import fallbacks
from anybit.kernels.cpu import bindings
from anybit.kernels.layout import BIT_WIDTHS
from tests.fixtures.engine import cached_logits
from tests.fixtures.native import native_only
from tests.fixtures.tiny_families import FAMILIES, tiny_family
from tests.fixtures.tiny_llama import decoder_of, save_llama

pytestmark = native_only
TOKENS = torch.randint(4, 500, (150,), generator=torch.Generator().manual_seed(7)).tolist()


# Heads of 24 numbers are no whole vectors.
WHOLE_VECTORS = {name: family for name, family in FAMILIES.items() if family[1].get("head_dim", 16) % 16 == 0}


def make_checkpoint(family, tmp_path_factory):
    source = HuggingFaceSource(save_llama(tiny_family(*family), tmp_path_factory.mktemp("family")))
    directory = tmp_path_factory.mktemp("checkpoint")
    quantize(source, directory, QuantizeOptions())
    return directory


@pytest.fixture(scope="module", params=WHOLE_VECTORS.values(), ids=WHOLE_VECTORS)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(request.param, tmp_path_factory)


def decoder_from(checkpoint, native):
    config = json.loads((checkpoint / "config.json").read_text())
    return decoder_of(config, NestedLoader(CheckpointReader(checkpoint), BIT_WIDTHS, 8, native=native))


@pytest.fixture(scope="module")
def decoder(checkpoint):
    return decoder_from(checkpoint, native=True)


@pytest.fixture(scope="module")
def portable(checkpoint):
    return decoder_from(checkpoint, native=False)


def logits(decoder, width=8, kv_format="float32", prompt=120):
    return cached_logits(decoder, TOKENS, prompt, width, kv_format)


def test_native_layers_compute_what_the_layers_one_by_one_do(decoder):
    one_by_one = replace(decoder, native=None)  # the same linears, everything else portable
    for kv_format in ("float32", "bf16"):
        native, portable = (torch.log_softmax(logits(d, 8, kv_format), -1) for d in (decoder, one_by_one))
        difference = (native - portable).abs().mean(1)
        # What rounds otherwise may turn a quantized activation, or a bf16 key, into its neighbour.
        assert difference.mean() < (1e-3 if kv_format == "float32" else 5e-3)
        assert (native.argmax(-1) == portable.argmax(-1)).float().mean() > 0.98


def test_native_logits_are_those_of_the_portable_kernels(decoder, portable):
    """Linears included: fifteen bits of activations beside fourteen."""
    native, expected = (torch.log_softmax(logits(d, 8, "float32"), -1) for d in (decoder, portable))
    assert (native - expected).abs().mean() < 3e-3  # a single int8 digit costs 0.03 to 0.08


def test_every_instruction_set_gives_the_same_bits(decoder):
    results = []
    for name in bindings.instruction_sets():
        bindings.select_instruction_set(name)
        results.append(logits(decoder, 4))
    bindings.select_instruction_set(bindings.instruction_sets()[0])
    assert all(torch.equal(result, results[0]) for result in results)


def test_cut_of_the_prompt_changes_no_bit(decoder):
    whole = logits(decoder, 4, "bf16", prompt=150)
    assert torch.equal(logits(decoder, 4, "bf16", prompt=64), whole)
    assert torch.equal(logits(decoder, 4, "bf16", prompt=1), whole)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_number_of_threads_changes_no_bit(decoder, num_threads):
    """Prompts and single tokens, with few rows and with many, over histories of one run of pages and of several."""
    tokens = TOKENS * 2  # 300: more than the 256 tokens of a run
    expected = cached_logits(decoder, tokens, 290, 3, "bf16")
    before = bindings.get_threads()
    bindings.set_threads(num_threads)
    try:
        assert torch.equal(cached_logits(decoder, tokens, 290, 3, "bf16"), expected)
    finally:
        bindings.set_threads(before)


def test_shape_without_whole_vectors_takes_the_layers_one_by_one_and_counts_it(tmp_path_factory):
    (family,) = (family for name, family in FAMILIES.items() if name not in WHOLE_VECTORS)
    before = sum(fallbacks.snapshot().values())
    assert decoder_from(make_checkpoint(family, tmp_path_factory), native=True).native is None
    assert sum(fallbacks.snapshot().values()) == before + 1
