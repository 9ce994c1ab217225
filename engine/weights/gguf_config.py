"""A Hugging Face config.json from the metadata of a GGUF file.

Written here rather than by Transformers, whose conversion leaves out what it does not know: biases, scaled rotary
embeddings, Qwen3's head size, Gemma's window pattern.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from anybit.engine.errors import SourceError, UnsupportedModelError
from anybit.engine.weights.gguf_metadata import GGUFMetadata

Config = dict[str, Any]
_ATTENTION_BIASES = frozenset(f"self_attn.{name}_proj.bias" for name in "qkv")
_OUTPUT_BIAS = "self_attn.o_proj.bias"
_MLP_BIASES = frozenset(f"mlp.{name}_proj.bias" for name in ("gate", "up", "down"))


def config_from_metadata(
    metadata: GGUFMetadata, tensor_names: Iterable[str], vocab_size: int, rope_divisors: Sequence[float] | None
) -> Config:
    """The config.json of a file that holds these tensors (Hugging Face names).

    SourceError for what the file should say and does not, UnsupportedModelError for what no decoder here does.
    """
    names = set(tensor_names)
    config = _shape(metadata, names)
    config["vocab_size"] = vocab_size
    config["tie_word_embeddings"] = "lm_head.weight" not in names
    config["rope_parameters"] = _rope(metadata, config, rope_divisors)
    config |= _FAMILIES[metadata.architecture](metadata, config)
    config |= _biases(metadata, config["model_type"], names)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _shape(metadata: GGUFMetadata, names: set[str]) -> Config:
    hidden_size = metadata.count("{arch}.embedding_length")
    num_heads = metadata.count("{arch}.attention.head_count")
    num_layers = metadata.count("{arch}.block_count")
    present = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
    if len(present) != num_layers or max(present) != num_layers - 1:
        raise SourceError(f"{metadata.path} states {num_layers} blocks and holds {len(present)}.")
    head_dim = metadata.count("{arch}.attention.key_length", max(hidden_size // num_heads, 1))
    if metadata.get("{arch}.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{metadata.path} has keys and values of different length, which is not supported.")
    if metadata.get("{arch}.rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(f"{metadata.path} rotates a part of each head only, which is not supported.")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": metadata.count("{arch}.feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.count("{arch}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.require("{arch}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.count("{arch}.context_length"),
    }


def _rope(metadata: GGUFMetadata, config: Config, divisors: Sequence[float] | None) -> Config:
    rope: Config = {"rope_type": "default", "rope_theta": metadata.get("{arch}.rope.freq_base", 10_000.0)}
    kind = metadata.get("{arch}.rope.scaling.type", "none")
    factor = metadata.get("{arch}.rope.scaling.factor")
    old_factor = metadata.get("{arch}.rope.scale_linear", 1.0)
    if kind == "none" and old_factor != 1.0:  # from before the scaling had a type
        kind, factor = "linear", old_factor
    if divisors is not None:
        if kind != "none":
            raise UnsupportedModelError(f"{metadata.path} scales its rotary embeddings twice, which is not supported.")
        # How files give Llama 3's scaling: not its parameters but what comes of them for each frequency. Of
        # Transformers' kinds, longrope says that.
        return rope | {
            "rope_type": "longrope",
            "short_factor": list(divisors),
            "long_factor": list(divisors),
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config["max_position_embeddings"],
        }
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{metadata.path} scales rotary embeddings by {kind!r}, which is not supported.")
    if not factor:
        raise SourceError(f"{metadata.path} scales its rotary embeddings and does not say by how much.")
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    return rope | {"rope_type": "yarn", "factor": factor} | _yarn(metadata, config, factor)


def _yarn(metadata: GGUFMetadata, config: Config, factor: float) -> Config:
    scaling = "{arch}.rope.scaling."
    if metadata.get(scaling + "yarn_log_multiplier") or metadata.get(scaling + "yarn_ext_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"{metadata.path} uses a variant of YaRN that is not supported.")
    # One key holds the factor on sines and cosines itself, the other what multiplies its usual value.
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    attention_factor = metadata.get(scaling + "yarn_attn_factor", usual * metadata.get(scaling + "attn_factor", 1.0))
    return {
        "original_max_position_embeddings": metadata.count(
            scaling + "original_context_length", config["max_position_embeddings"]
        ),
        "attention_factor": attention_factor,
        "beta_fast": metadata.get(scaling + "yarn_beta_fast", 32.0),
        "beta_slow": metadata.get(scaling + "yarn_beta_slow", 1.0),
    }


def _biases(metadata: GGUFMetadata, model_type: str, names: set[str]) -> Config:
    """The config's switches for biases; those of the file must be the ones that the model type means by them."""
    found = {name.split(".", 3)[3] for name in names if name.startswith("model.layers.") and name.endswith(".bias")}
    attention, mlp = bool(found & _ATTENTION_BIASES), bool(found & _MLP_BIASES)
    meant = set(_ATTENTION_BIASES if attention else ()) | set(_MLP_BIASES if mlp else ())
    if attention and model_type != "qwen2":
        meant.add(_OUTPUT_BIAS)
    if found != meant or (mlp and model_type != "llama") or (attention and model_type == "mistral"):
        raise UnsupportedModelError(f"{metadata.path} has biases where models of type {model_type!r} have none.")
    return {"attention_bias": attention} | ({"mlp_bias": mlp} if model_type == "llama" else {})


def _llama(metadata: GGUFMetadata, config: Config) -> Config:
    """Llama and Mistral files, which differ by the sliding window."""
    window = metadata.get("{arch}.attention.sliding_window")
    if window:
        return _named("mistral", "Mistral") | {"hidden_act": "silu", "sliding_window": window}
    return _named("llama", "Llama") | {"hidden_act": "silu"}


def _qwen2(metadata: GGUFMetadata, config: Config) -> Config:
    return _named("qwen2", "Qwen2") | _qwen(metadata)


def _qwen3(metadata: GGUFMetadata, config: Config) -> Config:
    return _named("qwen3", "Qwen3") | _qwen(metadata)


def _qwen(metadata: GGUFMetadata) -> Config:
    if metadata.get("{arch}.attention.sliding_window"):
        raise UnsupportedModelError(f"{metadata.path} states a sliding window, which is not supported for Qwen.")
    return {"hidden_act": "silu", "use_sliding_window": False}


def _gemma2(metadata: GGUFMetadata, config: Config) -> Config:
    theta = config["rope_parameters"]["rope_theta"]
    if metadata.get("{arch}.rope.freq_base_swa", theta) != theta:
        raise UnsupportedModelError(f"{metadata.path} has two bases of rotary embeddings, which Gemma 2 has not.")
    return {
        **_named("gemma2", "Gemma2"),
        **_gemma(metadata, config, window=4096, period=2, layers_of_27b=46),
        "attn_logit_softcapping": metadata.get("{arch}.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.get("{arch}.final_logit_softcapping", 30.0),
    }


def _gemma3(metadata: GGUFMetadata, config: Config) -> Config:
    # What the file says is the rotation of full attention; sliding layers have their own base and are never scaled.
    local = {"rope_type": "default", "rope_theta": metadata.get("{arch}.rope.freq_base_swa", 10_000.0)}
    return {
        **_named("gemma3_text", "Gemma3"),
        **_gemma(metadata, config, window=None, period=6, layers_of_27b=62),
        "attn_logit_softcapping": metadata.get("{arch}.attn_logit_softcapping"),
        "final_logit_softcapping": metadata.get("{arch}.final_logit_softcapping"),
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


def _gemma(metadata: GGUFMetadata, config: Config, window: int | None, period: int, layers_of_27b: int) -> Config:
    """What Gemma 2 and 3 share. Files do not state the query scale; only that of the 27B models is not head_dim^-1/2."""
    num_layers = config["num_hidden_layers"]
    query_scalar = config["head_dim"]
    if num_layers == layers_of_27b:
        query_scalar = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": query_scalar,
        "sliding_window": metadata.count("{arch}.attention.sliding_window", window),
        "layer_types": _layer_types(metadata, num_layers, period),
    }


def _layer_types(metadata: GGUFMetadata, num_layers: int, period: int) -> list[str]:
    """The pattern is a list of which layers slide, or a number n: all slide but each n-th."""
    pattern = metadata.get("{arch}.attention.sliding_window_pattern", period)
    if not isinstance(pattern, list):
        pattern = [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(num_layers)]
    if len(pattern) != num_layers:
        raise SourceError(f"{metadata.path} says of {len(pattern)} layers whether they slide, and has {num_layers}.")
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


def _named(model_type: str, class_prefix: str) -> Config:
    return {"model_type": model_type, "architectures": [f"{class_prefix}ForCausalLM"]}


_FAMILIES: dict[str, Callable[[GGUFMetadata, Config], Config]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
