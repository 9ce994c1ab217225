"""The start-up check of sealed formats: what it measures, which layers it raises, and a server that has such layers."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from anybit.engine.assemble import assemble
from anybit.engine.config import EngineConfig
from anybit.engine.kv import sealed_setup
from anybit.engine.kv.prompt_heads import LayerHeads
from anybit.engine.kv.selfcheck import RAISED_FORMAT, check_format
from anybit.engine.quantize.run import QuantizeOptions, quantize
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.kernels import fallbacks
from anybit.kernels.attention_inputs import AttentionSettings
from anybit.kvcache.codec.balance import balance_weights
from anybit.kvcache.formats import SEALED_FORMATS
from anybit.kvcache.spec import KVSpec
from tests.fixtures.engine import make_request, run
from tests.fixtures.native import native_only
from tests.fixtures.tiny_llama import save_llama, tiny_llama

SPEC = KVSpec(num_layers=3, num_kv_heads=2, head_dim=32)
SETTINGS = [
    AttentionSettings(32**-0.5),
    AttentionSettings(32**-0.5, window=100),
    AttentionSettings(32**-0.5, None, 20.0),
]


def gaussian_heads(seed, num_tokens=200):
    generator = torch.Generator().manual_seed(seed)
    return LayerHeads(*(torch.randn(heads, num_tokens, 32, generator=generator) for heads in (4, 2, 2)))


def lopsided_heads(seed):
    """Keys that vary most in a channel that queries hardly look at, as those of layers with biases do."""
    heads = gaussian_heads(seed)
    heads.keys[..., 5] *= 100
    heads.queries[..., 5] /= 100
    return heads


def check(kv_format, heads, weights=None):
    return check_format(SPEC.of_format(kv_format), heads, SETTINGS, weights)


@pytest.mark.parametrize("kv_format", [*SEALED_FORMATS, "qet4/qet2", "qet2/qet4"])
def test_heads_that_are_normally_distributed_are_left_alone(kv_format):
    found = check(kv_format, [gaussian_heads(seed) for seed in range(3)])
    assert found.spec == SPEC.of_format(kv_format)
    assert (found.spec.layer_formats, found.raised_errors, found.hopeless) == ({}, {}, ())


def test_errors_are_those_of_the_codes_and_fall_with_more_bits():
    heads = [gaussian_heads(seed) for seed in range(3)]
    previous = [0.006] * 3
    for kv_format in ("qet4", "qet3", "qet2"):
        for layer, errors in enumerate(check(kv_format, heads).errors):
            assert errors.keys == pytest.approx(errors.values, rel=0.05)
            assert errors.attention > 1.5 * previous[layer]
            previous[layer] = errors.attention
    assert check("qet4", heads).errors[0].values == pytest.approx(0.086, rel=0.03)
    assert max(errors.attention for errors in check("uniform8", heads).errors) < 0.008


def test_a_layer_that_loses_too_much_is_raised_and_no_other():
    heads = [gaussian_heads(0), lopsided_heads(1), gaussian_heads(2)]
    found = check("qet4", heads)
    assert found.spec.layer_formats == {1: RAISED_FORMAT}
    assert found.errors[1].attention > 0.5
    assert found.raised_errors[1].attention < 0.05
    balanced = [balance_weights(layer.queries[None], layer.keys[None]) for layer in heads]
    assert check("qet4", heads, balanced).spec.layer_formats == {}


def test_a_layer_that_nothing_helps_is_told_of(caplog):
    heads = [gaussian_heads(seed) for seed in range(3)]
    heads[2].keys[0, 7, 3] = math.nan
    found = check("qet4", heads)
    assert (found.spec.layer_formats, found.hopeless) == ({}, (2,))
    with caplog.at_level(logging.WARNING):
        found.report()
    (record,) = caplog.records
    assert "in layer 2 of this model" in record.message


@pytest.fixture(scope="module")
def sharp_checkpoint(tmp_path_factory):
    """A model whose second layer looks at single tokens, so that a little error in keys makes it look at others."""
    model = tiny_llama(hidden_size=64, intermediate_size=96, head_dim=32, num_hidden_layers=3)
    for layer, sharpness in enumerate((0.02, 60.0, 0.02)):
        model.model.layers[layer].self_attn.q_proj.weight.data *= sharpness
    source = HuggingFaceSource(save_llama(model, tmp_path_factory.mktemp("source")))
    directory = tmp_path_factory.mktemp("checkpoint")
    quantize(source, directory, QuantizeOptions(method="rtn"))
    return directory


@pytest.fixture
def config(sharp_checkpoint):
    return EngineConfig(
        str(sharp_checkpoint), "tiny", max_num_seqs=2, kv_format="qet4", kv_formats=("bf16",), kv_cache_bytes=8 << 20
    )


def test_a_server_with_a_raised_layer_says_so_and_counts_its_bytes(config, caplog):
    with caplog.at_level(logging.INFO):
        core, info = assemble(config)
    assert [kv.raised_layers for kv in info.kv_formats] == [[1], []]
    mixed = KVSpec(3, 2, 32, "qet4", {1: "uniform8"})
    assert info.kv_formats[0].bytes_per_token == mixed.bytes_per_token
    assert "KV format qet4 is not good enough for layer 1 of this model" in caplog.text
    asked = [make_request(str(index), range(5, 150 + index), 20, 4, "qet4") for index in range(3)]
    together = run(core, asked)
    alone = {name: tokens for request in asked for name, tokens in run(assemble(config)[0], [request]).items()}
    assert together == alone


@native_only
def test_a_raised_layer_leaves_the_native_step_and_is_counted(config, caplog):
    with caplog.at_level(logging.WARNING):
        core, _ = assemble(config)
    assert "every request of this server is computed layer by layer" in caplog.text
    before = sum(fallbacks.snapshot().values())
    run(core, [make_request("a", range(5, 80), 3, 4, "bf16")])
    assert sum(fallbacks.snapshot().values()) == before + 3


def test_a_context_too_short_for_the_check_is_told_of(config, caplog, monkeypatch):
    monkeypatch.setattr(sealed_setup, "read_heads", None)
    with caplog.at_level(logging.WARNING):
        _, info = assemble(replace(config, max_model_len=100))
    assert info.kv_formats[0].raised_layers == []
    assert "KV formats are unchecked, and keys without balance weights: there are 100 tokens" in caplog.text
