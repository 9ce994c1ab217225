"""The native step over sealed pages of heads of every size, against PyTorch's attention over the same pages."""

from dataclasses import replace

import pytest
import torch

from anybit.engine.models.native import NativeLayers
from anybit.engine.quantize.run import QuantizeOptions, quantize
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import NestedLoader
from anybit.kernels.cpu.bindings import instruction_sets, select_instruction_set, selected_instruction_set
from tests.fixtures.engine import cached_logits
from tests.fixtures.native import native_only
from tests.fixtures.tiny_families import FAMILIES, tiny_family
from tests.fixtures.tiny_llama import decoder_of, save_llama

pytestmark = native_only
FORMATS = ("qet4", "qet3", "qet2", "qet2+2@2", "qet3/qet2", "qet2/qet4")
TOKENS = torch.randint(4, 500, (210,), generator=torch.Generator().manual_seed(12)).tolist()


@pytest.fixture(scope="module", params=[16, 32, 64, 128, 256])
def decoder(request, tmp_path_factory):
    """Of the family with windows and soft caps."""
    model_type, overrides = FAMILIES["gemma2"]
    model = tiny_family(
        model_type, {**overrides, "hidden_size": 64, "intermediate_size": 96, "head_dim": request.param}
    )
    source = HuggingFaceSource(save_llama(model, tmp_path_factory.mktemp("source")))
    directory = tmp_path_factory.mktemp("checkpoint")
    quantize(source, directory, QuantizeOptions(method="rtn"))
    return decoder_of(source.config, NestedLoader(CheckpointReader(directory), (8,), 8, "cpu"))


@pytest.mark.parametrize("kv_format", FORMATS)
def test_logits_are_those_of_the_portable_layers(decoder, kv_format):
    assert isinstance(decoder.native, NativeLayers)
    got = cached_logits(decoder, TOKENS, 190, 8, kv_format)
    expected = cached_logits(replace(decoder, native=None), TOKENS, 190, 8, kv_format)
    # What is rounded to exact pages, and what is sealed, goes to the other side now and then.
    assert float((got - expected).norm() / expected.norm()) < 0.05


def test_every_instruction_set_and_every_cut_give_the_same_logits(decoder):
    before = selected_instruction_set()
    expected = cached_logits(decoder, TOKENS, 190, 8, "qet4/qet3")
    try:
        for name in instruction_sets():
            select_instruction_set(name)
            assert torch.equal(cached_logits(decoder, TOKENS, 150, 8, "qet4/qet3"), expected)
    finally:
        select_instruction_set(before)
