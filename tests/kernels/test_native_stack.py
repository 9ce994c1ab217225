"""All layers in one native call, against the portable layers and on every instruction set."""

import json
from dataclasses import replace

import pytest
import torch

from anybit.engine.quantize.run import QuantizeOptions, quantize
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import NestedLoader
from anybit.kernels.cpu import library
from anybit.kernels.layout import BIT_WIDTHS
from tests.fixtures.engine import cached_logits
from tests.fixtures.tiny_families import FAMILIES, tiny_family
from tests.fixtures.tiny_llama import decoder_of, save_llama

pytestmark = pytest.mark.skipif(library.library() is None, reason="the native kernels were not built")
TOKENS = torch.randint(4, 500, (150,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def decoder(request, tmp_path_factory):
    source = HuggingFaceSource(save_llama(tiny_family(*request.param), tmp_path_factory.mktemp("family")))
    directory = tmp_path_factory.mktemp("checkpoint")
    quantize(source, directory, QuantizeOptions())
    config = json.loads((directory / "config.json").read_text())
    return decoder_of(config, NestedLoader(CheckpointReader(directory), BIT_WIDTHS, 8))


def logits(decoder, width=8, kv_format="float32", prompt=120):
    return cached_logits(decoder, TOKENS, prompt, width, kv_format)


def test_native_layers_compute_what_the_layers_one_by_one_do(decoder):
    if decoder.native is None:
        pytest.skip("rows or heads of this shape are not whole vectors")
    one_by_one = replace(decoder, native=None)  # the same linears, everything else portable
    for kv_format in ("float32", "bf16"):
        native, portable = (torch.log_softmax(logits(d, 8, kv_format), -1) for d in (decoder, one_by_one))
        difference = (native - portable).abs().mean(1)
        # What rounds otherwise may turn a quantized activation, or a bf16 key, into its neighbour: rare, but it shows in
        # all tokens after it; the first token has nothing before it.
        assert difference[0] < 1e-5
        assert difference.mean() < 0.03  # int8 activations themselves cost 0.03 to 0.08 on these models
        assert (native.argmax(-1) == portable.argmax(-1)).float().mean() > 0.95


def test_every_instruction_set_gives_the_same_bits(decoder):
    if decoder.native is None:
        pytest.skip("rows or heads of this shape are not whole vectors")
    results = []
    for name in library.instruction_sets():
        library.select_instruction_set(name)
        results.append(logits(decoder, 4))
    library.select_instruction_set(library.instruction_sets()[0])
    assert all(torch.equal(result, results[0]) for result in results)


def test_cut_of_the_prompt_changes_no_bit(decoder):
    whole = logits(decoder, 4, "bf16", prompt=150)
    assert torch.equal(logits(decoder, 4, "bf16", prompt=64), whole)
    assert torch.equal(logits(decoder, 4, "bf16", prompt=1), whole)
