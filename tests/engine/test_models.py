"""The decoder against Transformers, and config.json files that cannot be served."""

import json
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.engine.errors import UnsupportedModelError
from anybit.engine.models.config import DecoderConfig, LayerConfig, Rope, RopeScaling
from anybit.engine.models.registry import parse_config
from tests.fixtures.engine import cached_logits
from tests.fixtures.sentences import assert_one_sentence
from tests.fixtures.tiny_llama import dense_decoder, save_llama, tiny_config, tiny_llama

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0] * 4 + [2.0] * 4,
    "long_factor": [1.0] * 4 + [2.0] * 4,
    "attention_factor": 1.5,
}
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "untied, biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads, linear rope": {
        "head_dim": 24,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    },
    "no grouped queries, llama3 rope": {"num_key_value_heads": 4, "rope_parameters": LLAMA3_ROPE},
    "large base, eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 0.1},
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def pair(request, tmp_path_factory):
    """A Transformers model and our decoder over the same files."""
    model = tiny_llama(**request.param)
    return model, dense_decoder(save_llama(model, tmp_path_factory.mktemp("llama")))


def test_decoder_gives_the_logits_of_transformers_for_a_prompt_and_from_the_cache(pair):
    model, decoder = pair
    token_ids = torch.randint(512, (100,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(token_ids[None]).logits[0]
    assert expected.abs().max() > 1
    assert (cached_logits(decoder, token_ids.tolist(), 90) - expected).abs().max() < 1e-4
    assert (cached_logits(decoder, token_ids.tolist()[:8], 1) - expected[:8]).abs().max() < 1e-4


def test_shards_and_one_file_hold_the_same_model(tmp_path):
    model = tiny_llama()
    one = save_llama(model, tmp_path / "one")
    many = save_llama(model, tmp_path / "many", max_shard_size="100KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    tokens = list(range(20))
    assert torch.equal(cached_logits(dense_decoder(one), tokens, 20), cached_logits(dense_decoder(many), tokens, 20))


CONFIG = json.loads(tiny_config().to_json_string())


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": 5000.0}, 5000.0, RopeScaling()),
        ({"rope_theta": 5000.0, "rope_scaling": None}, 5000.0, RopeScaling()),
        ({}, 10_000.0, RopeScaling()),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}}, 7.0, RopeScaling("linear", 2.0)),
        (
            {"rope_theta": 7.0, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
            7.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        ),
        ({"rope_parameters": LLAMA3_ROPE}, 500.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
        (
            {"rope_parameters": LONGROPE},
            500.0,
            RopeScaling("divisors", attention_factor=1.5, divisors=(1.0,) * 4 + (2.0,) * 4),
        ),
    ],
)
def test_parse_config_reads_rope_as_written_by_old_and_new_libraries(changes, theta, scaling):
    plain = {key: value for key, value in CONFIG.items() if not key.startswith("rope")}
    parsed = parse_config({**plain, **changes})
    assert parsed.layers == (LayerConfig(Rope(theta, scaling)),) * 2


def test_parse_config_fills_in_what_old_configs_leave_out():
    optional = ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "tie_word_embeddings", "hidden_act")
    parsed = parse_config({key: value for key, value in CONFIG.items() if key not in optional})
    assert (parsed.head_dim, parsed.num_kv_heads) == (16, 4)
    assert not parsed.attention_bias
    assert not parsed.mlp_bias
    assert not parsed.tie_word_embeddings
    assert parsed.attention_scale == 0.25


REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_parse_config_names_a_missing_entry(key):
    with pytest.raises(UnsupportedModelError) as caught:
        parse_config({name: value for name, value in CONFIG.items() if name != key})
    assert_one_sentence(caught.value, key)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "'mamba'"),
        ({"model_type": None}, "None"),
        ({"model_type": ["llama"]}, "llama"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "part of the head"),
        ({"num_hidden_layers": 0}, "0 layers"),
        ({"num_hidden_layers": 2**40}, "layers"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {k: v for k, v in LLAMA3_ROPE.items() if k != "low_freq_factor"}}, "low_freq_factor"),
        ({"rope_parameters": {**LONGROPE, "short_factor": [1.0] * 8}}, "LongRoPE"),
        ({"rope_parameters": {**LONGROPE, "short_factor": [1.0] * 6, "long_factor": [1.0] * 6}}, "8 positive factors"),
        ({"rope_parameters": {**LONGROPE, "short_factor": [0.0] * 8, "long_factor": [0.0] * 8}}, "8 positive factors"),
        ({"rope_parameters": {k: v for k, v in LONGROPE.items() if k != "attention_factor"}}, "attention_factor"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "'gelu'"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "Bidirectional"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "1 layer types for 2 layers"),
        ({"model_type": "mistral", "layer_types": ["chunked_attention"] * 2}, "'chunked_attention'"),
        ({"model_type": "mistral", "sliding_window": 0}, "window of 0"),
        ({"hidden_size": "wide"}, "wide"),
        ({"num_hidden_layers": None}, "NoneType"),
    ],
)
def test_parse_config_says_in_a_sentence_what_is_not_supported(changes, named):
    with pytest.raises(UnsupportedModelError) as caught:
        parse_config({**CONFIG, **changes})
    assert_one_sentence(caught.value, named)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]),
    st.sampled_from([*CONFIG, "rope_scaling", "rope_theta", "layer_types", "sliding_window", "sliding_window_pattern"]),
    json_values,
)
def test_parse_config_reads_or_refuses_whatever_an_entry_holds(family, key, value):
    with suppress(UnsupportedModelError):
        assert isinstance(parse_config({**CONFIG, "model_type": family, key: value}), DecoderConfig)
