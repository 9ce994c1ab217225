"""GGUF files of every architecture: the decoder over them against Transformers' source model."""

from dataclasses import replace

import gguf
import pytest
import torch

from anybit.engine.errors import SourceError, UnsupportedModelError
from anybit.engine.models.registry import parse_config
from anybit.engine.weights.gguf_source import GGUFSource
from anybit.engine.weights.loader import DenseLoader
from tests.fixtures.engine import cached_logits
from tests.fixtures.sentences import assert_one_sentence
from tests.fixtures.tiny_families import FAMILIES, GEMMA3_ROPES, YARN, tiny_family
from tests.fixtures.tiny_gguf import write_gguf
from tests.fixtures.tiny_llama import decoder_of

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"sliding_window": 20, "query_pre_attn_scalar": 16}  # files do not hold the scale: it is that of the head size
WRITTEN = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": FAMILIES["mistral"],
    "mistral, sliding": FAMILIES["mistral, sliding"],
    "qwen2": FAMILIES["qwen2"],
    "qwen2, untied, yarn": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "qwen3": FAMILIES["qwen3"],
    "qwen3, biases, wide heads, yarn": (
        "qwen3",
        {"attention_bias": True, "head_dim": 24, "rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0}},
    ),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", {**GEMMA, "rope_parameters": GEMMA3_ROPES, "num_hidden_layers": 7}),
    "gemma3, unscaled": ("gemma3_text", GEMMA),
}
TOKENS = torch.randint(512, (100,), generator=torch.Generator().manual_seed(1)).tolist()


def written(name, tmp_path, **options):
    model = tiny_family(*WRITTEN[name])
    return model, GGUFSource(write_gguf(model, tmp_path / "file.gguf", **options))


def assert_same_logits(source, model):
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    assert expected.abs().max() > 1
    own = cached_logits(decoder_of(source.config, DenseLoader(source)), TOKENS, 90)
    assert (own - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", WRITTEN)
def test_decoder_over_the_file_gives_the_logits_of_transformers(tmp_path, name):
    model, source = written(name, tmp_path)
    assert_same_logits(source, model)


@pytest.mark.parametrize("name", WRITTEN)
def test_file_holds_every_tensor_under_its_hugging_face_name(tmp_path, name):
    model, source = written(name, tmp_path)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert sorted(source.tensor_names()) == sorted(state)
    for tensor_name, tensor in state.items():
        # Adding 1 to a norm's weight and taking it away again rounds twice.
        assert torch.allclose(source.tensor(tensor_name), tensor, rtol=0, atol=2e-7), tensor_name


@pytest.mark.parametrize("name", WRITTEN)
def test_config_gives_the_same_decoder_as_the_models_own(tmp_path, name):
    model, source = written(name, tmp_path)
    own, expected = parse_config(source.config), parse_config(model.config.to_dict())
    assert own.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    own = replace(own, rms_norm_eps=expected.rms_norm_eps)
    if "llama3" in name:  # stated by its results, not by its parameters
        own = replace(own, layers=expected.layers)
    assert own.layers[0].rope.scaling.beta_fast == pytest.approx(expected.layers[0].rope.scaling.beta_fast)
    assert close_factors(own) == close_factors(expected)


def close_factors(config):
    """The config with its YaRN factor on sines and cosines, which files hold in float32, rounded."""

    def rounded(layer):
        scaling = layer.rope.scaling
        scaling = replace(scaling, attention_factor=round(scaling.attention_factor, 5))
        return replace(layer, rope=replace(layer.rope, scaling=scaling))

    return replace(config, layers=tuple(map(rounded, config.layers)))


@pytest.mark.parametrize("name", ["llama, llama3", "gemma3"])
def test_transformers_reads_the_config_as_the_models_own(tmp_path, name):
    """The checkpoint's config.json is one that Transformers would compute the same logits from."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model, source = written(name, tmp_path)
    config = dict(source.config)
    other = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[config["model_type"]].from_dict(config), attn_implementation="eager"
    )
    other.load_state_dict({key: source.tensor(key) for key in source.tensor_names()}, strict=False)
    other.tie_weights()
    other = other.to(torch.float32).eval()
    with torch.inference_mode():
        ids = torch.tensor([TOKENS])
        assert (other(ids).logits - model(ids).logits).abs().max() < 1e-4


def test_gemma3_pattern_and_local_base_are_read_where_stated(tmp_path):
    ropes = {**GEMMA3_ROPES, "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}
    model = tiny_family("gemma3_text", {**GEMMA, "rope_parameters": ropes, "sliding_window_pattern": 2})

    def add(pattern):
        def edit(writer):
            writer.add_rope_freq_base_swa(5e3)
            writer.add_sliding_window_pattern(pattern)

        return edit

    for number, pattern in enumerate((2, [True, False, True])):
        path = write_gguf(model, tmp_path / f"{number}.gguf", edit=add(pattern))
        assert_same_logits(GGUFSource(path), model)


@pytest.mark.parametrize(("model_type", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_gemma_27b_has_its_own_query_scale(tmp_path, model_type, layers):
    """The 27B models, told by their number of layers, divide by the root of hidden size over heads."""
    shape = {**GEMMA, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": layers, "head_dim": 16}
    model = tiny_family(model_type, {**shape, "query_pre_attn_scalar": 8, "initializer_range": 0.05})
    source = GGUFSource(write_gguf(model, tmp_path / "file.gguf"))
    assert source.config["query_pre_attn_scalar"] == 8
    assert parse_config(source.config).attention_scale == parse_config(model.config.to_dict()).attention_scale


def test_linear_factor_of_old_files_is_read(tmp_path):
    model, source = written("llama, linear", tmp_path)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    path = write_gguf(
        model, tmp_path / "old.gguf", edit=lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0)
    )
    assert parse_config(GGUFSource(path).config) == parse_config(source.config)


def test_unequal_numbers_of_heads_are_refused(tmp_path):
    model = tiny_family(*WRITTEN["llama"])
    source = GGUFSource(write_gguf(model, tmp_path / "file.gguf"))
    assert source.config["num_key_value_heads"] == 2
    equal = write_gguf(
        model,
        tmp_path / "equal.gguf",
        edit=lambda writer: writer.add_array("llama.attention.head_count_kv", [2, 2, 2]),
    )
    assert GGUFSource(equal).config["num_key_value_heads"] == 2
    unequal = write_gguf(
        model,
        tmp_path / "unequal.gguf",
        edit=lambda writer: writer.add_array("llama.attention.head_count_kv", [2, 1, 2]),
    )
    with pytest.raises(SourceError) as caught:
        _ = GGUFSource(unequal).config
    assert_one_sentence(caught.value, "llama.attention.head_count_kv")


REFUSED = {
    "part of the head": ("llama", lambda writer: writer.add_rope_dimension_count(8), "part of each head"),
    "values of another length": ("qwen3", lambda writer: writer.add_value_length(8), "different length"),
    "longrope": (
        "qwen2",
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
        "'longrope'",
    ),
    "two scalings": (
        "llama, llama3",
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        "twice",
    ),
    "other yarn": (
        "qwen2, untied, yarn",
        lambda writer: writer.add_rope_scaling_yarn_log_mul(0.5),
        "YaRN",
    ),
    "sliding qwen": ("qwen2", lambda writer: writer.add_sliding_window(20), "sliding window"),
    "two bases": ("gemma2", lambda writer: writer.add_rope_freq_base_swa(5e5), "two bases"),
}


@pytest.mark.parametrize(("name", "edit", "word"), REFUSED.values(), ids=REFUSED)
def test_what_no_decoder_does_is_refused(tmp_path, name, edit, word):
    _, source = written(name, tmp_path, edit=edit)
    with pytest.raises(UnsupportedModelError) as caught:
        _ = source.config
    assert_one_sentence(caught.value, word)


@pytest.mark.parametrize("kept", ["attn_v", "ffn_up"])
def test_biases_where_the_family_has_none_are_refused(tmp_path, monkeypatch, kept):
    from tests.fixtures import tiny_gguf

    model = tiny_family(*WRITTEN["llama, biases"])
    all_tensors = tiny_gguf.gguf_tensors(model, "llama")
    some = {key: value for key, value in all_tensors.items() if not key.endswith(".bias") or kept in key}
    monkeypatch.setattr(tiny_gguf, "gguf_tensors", lambda *_: some)
    with pytest.raises(UnsupportedModelError) as caught:
        _ = GGUFSource(write_gguf(model, tmp_path / "file.gguf")).config
    assert_one_sentence(caught.value, "biases")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("qwen2, untied, yarn", "qwen2.rope.scaling.factor"),
        ("llama", "llama.attention.head_count"),
        ("gemma3", "gemma3.attention.sliding_window_pattern"),
        ("gemma3", "gemma3.block_count"),
    ],
)
def test_entries_of_another_type_are_told(tmp_path, name, key):
    _, source = written(name, tmp_path, edit=lambda writer: writer.add_string(key, "many"))
    with pytest.raises(SourceError) as caught:
        _ = source.config
    assert_one_sentence(caught.value, "file.gguf")


def test_pattern_of_another_length_is_told(tmp_path):
    edit = {"edit": lambda writer: writer.add_sliding_window_pattern([True, False])}
    _, source = written("gemma3, unscaled", tmp_path, **edit)
    with pytest.raises(SourceError) as caught:
        _ = source.config
    assert_one_sentence(caught.value, "2 layers", "has 3")


def test_missing_blocks_are_told(tmp_path):
    model = tiny_family(*WRITTEN["qwen2"])
    source = GGUFSource(write_gguf(model, tmp_path / "file.gguf", edit=lambda writer: writer.add_block_count(5)))
    with pytest.raises(SourceError) as caught:
        _ = source.config
    assert_one_sentence(caught.value, "states 5 blocks and holds 3")


def test_missing_entry_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "qwen3")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError) as caught:
        _ = GGUFSource(tmp_path / "file.gguf").config
    assert_one_sentence(caught.value, "qwen3.embedding_length")
