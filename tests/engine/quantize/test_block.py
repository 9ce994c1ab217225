"""The differentiable block computes what the served decoder computes, for every family."""

import pytest
import torch
import torch.nn.functional as F

from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.models.registry import parse_config
from anybit.engine.quantize.calibrate.block import SITES, Block, load_linears, load_vectors
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import DenseLoader
from tests.fixtures.engine import cached_logits
from tests.fixtures.tiny_families import FAMILIES, tiny_family
from tests.fixtures.tiny_llama import decoder_of, save_llama, tiny_llama

TOKENS = torch.randint(512, (60,), generator=torch.Generator().manual_seed(1))


MODELS = {"llama, biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True)} | {
    name: lambda arguments=arguments: tiny_family(*arguments) for name, arguments in FAMILIES.items()
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_give_the_decoders_logits(name, tmp_path):
    source = HuggingFaceSource(save_llama(MODELS[name](), tmp_path / "model"))
    decoder = decoder_of(source.config, DenseLoader(source))
    config = parse_config(source.config)
    hidden = decoder.embedding.embed(TOKENS)[None] * config.embedding_scale
    for layer in range(config.num_layers):
        rotary = RotaryEmbedding(config.layers[layer].rope, config.head_dim, 64)
        block = Block(config, layer, rotary)
        seen = {}
        linears = load_linears(source, layer, torch.device("cpu"))
        vectors = load_vectors(source, config, layer, torch.device("cpu"))
        hidden = block(hidden, linears, vectors, lambda site, x, seen=seen: seen.update({site: x}))
        assert [*seen] == [site.name for site in SITES]
        assert all(seen[site].shape[-1] == linears[site].shape[1] for site in seen)
    expected = cached_logits(decoder, TOKENS.tolist(), 60)
    assert (decoder.logits(hidden[0]) - expected).abs().max() < 1e-3
    assert F.cosine_similarity(decoder.logits(hidden[0]), expected).min() > 0.9999
