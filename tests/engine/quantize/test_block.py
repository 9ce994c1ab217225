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


def test_queries_and_keys_are_rotated_and_their_gradients_rotated_back(tmp_path):
    config = parse_config(HuggingFaceSource(save_llama(tiny_llama(), tmp_path / "model")).config)
    rotary = RotaryEmbedding(config.layers[0].rope, config.head_dim, 64)
    heads = config.num_heads + 2 * config.num_kv_heads
    qkv = torch.randn(2, 9, heads * config.head_dim, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = Block(config, 0, rotary).heads(qkv, {})

    split = qkv.view(2 * 9, heads, -1).split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
    positions = torch.arange(9).repeat(2)
    wanted = [rotary.rotate(part, positions) for part in split[:2]] + [split[2]]
    wanted = [part.view(2, 9, -1, config.head_dim).transpose(1, 2) for part in wanted]
    weights = [torch.randn(part.shape, generator=torch.Generator().manual_seed(2)) for part in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    gradients = [
        torch.autograd.grad(sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)), qkv)[0]
        for parts in (found, wanted)
    ]
    assert torch.equal(*gradients)
