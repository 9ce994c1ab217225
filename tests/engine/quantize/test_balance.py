"""Balancing moves channel scales between linears and leaves what a block computes alone."""

import pytest
import torch

from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.models.registry import parse_config
from anybit.engine.quantize.calibrate.balance import ChannelSizes, balance
from anybit.engine.quantize.calibrate.block import SITES, Block, load_linears, load_vectors
from anybit.engine.quantize.calibrate.moments import InputMoments
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from tests.fixtures.tiny_families import FAMILIES, tiny_family
from tests.fixtures.tiny_llama import save_llama, tiny_llama

CPU = torch.device("cpu")
MODELS = {"llama, biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True)} | {
    name: lambda arguments=arguments: tiny_family(*arguments) for name, arguments in FAMILIES.items()
}


@pytest.mark.parametrize("name", MODELS)
def test_a_balanced_block_computes_the_same(name, tmp_path):
    source = HuggingFaceSource(save_llama(MODELS[name](), tmp_path / "model"))
    config = parse_config(source.config)
    block = Block(config, 0, RotaryEmbedding(config.layers[0].rope, config.head_dim, 64))
    linears = load_linears(source, 0, CPU)
    vectors = load_vectors(source, config, 0, CPU)
    hidden = torch.randn(2, 40, config.hidden_size) * torch.logspace(-1, 1, config.hidden_size)
    sizes = {site.name: ChannelSizes(linears[site.name].shape[1], CPU) for site in SITES}
    before = {site.name: InputMoments(linears[site.name].shape[1], CPU) for site in SITES}
    after = {site.name: InputMoments(linears[site.name].shape[1], CPU) for site in SITES}

    def tap(site, x):
        sizes[site].add(x)
        before[site].add(x)

    expected = block(hidden, linears, vectors, tap)
    balanced = balance(config, linears, vectors, sizes, 0.25)
    output = block(hidden, balanced.linears, balanced.vectors, lambda site, x: after[site].add(x))

    assert (output - expected).abs().max() < 1e-4 * expected.abs().max()
    for site, moments in before.items():
        moments.divide_inputs(balanced.input_scales[site])
        difference = moments.hessian - after[site].hessian
        assert difference.abs().max() < 1e-4 * moments.hessian.diagonal().max()
        assert not torch.equal(balanced.linears[site], linears[site])


def test_channels_without_input_or_with_infinities_do_no_harm():
    sizes = ChannelSizes(4, CPU)
    first, second = [9e9, 9e9, 9e9, 9e9], [1.0, 2.0, 0.0, 4.0]
    sizes.add(torch.tensor([[first, second], [first, [float("inf"), 0.0, 0.0, 0.0]]]))
    assert sizes.mean_square.tolist() == [1.0, 4.0, 0.0, 16.0]
