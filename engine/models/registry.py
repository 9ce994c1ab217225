"""Reads a Hugging Face config.json into a DecoderConfig, or says in one sentence why it cannot."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from anybit.engine.errors import CheckpointError, UnsupportedModelError
from anybit.engine.models.config import DecoderConfig, LayerConfig, Rope, RopeScaling

Config = Mapping[str, Any]

_MOST_LAYERS = 1024  # per-layer settings are listed; a config must not decide how long that list is


def read_config(directory: Path) -> DecoderConfig:
    """The decoder of a checkpoint directory; CheckpointError if its config.json cannot be read."""
    path = directory / "config.json"
    try:
        return parse_config(msgspec.json.decode(path.read_bytes(), type=dict[str, Any]))
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"The file {path} cannot be read.") from error


def parse_config(config: Config) -> DecoderConfig:
    """The decoder described by a config.json; UnsupportedModelError names what is not implemented or missing."""
    family = config.get("model_type")
    parser = _FAMILIES.get(str(family))
    if parser is None:
        known = ", ".join(sorted(_FAMILIES))
        raise UnsupportedModelError(f"Models of type {family!r} are not supported; supported types: {known}.")
    try:
        return parser(config)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        if isinstance(error, KeyError):
            raise UnsupportedModelError(f"The model's config.json lacks the entry {error}.") from error
        raise UnsupportedModelError(f"The model's config.json cannot be used: {error}.") from error


def _llama(config: Config) -> DecoderConfig:
    _want(config, "hidden_act", "silu", default="silu")
    bias = bool(config.get("attention_bias", False))
    return replace(
        _common(config),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _mistral(config: Config) -> DecoderConfig:
    _want(config, "hidden_act", "silu", default="silu")
    return _common(config, windows=_windows(config, config.get("sliding_window"), "sliding_attention"))


def _qwen2(config: Config) -> DecoderConfig:
    _want(config, "hidden_act", "silu", default="silu")
    return replace(_common(config, windows=_qwen_windows(config)), attention_bias=True)


def _qwen3(config: Config) -> DecoderConfig:
    _want(config, "hidden_act", "silu", default="silu")
    bias = bool(config.get("attention_bias", False))
    return replace(
        _common(config, windows=_qwen_windows(config)),
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=True,
    )


def _gemma2(config: Config) -> DecoderConfig:
    window = int(config.get("sliding_window") or 4096)
    types = config.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(_num_layers(config))
    ]
    return replace(
        _common(config, windows=_windows({**config, "layer_types": types}, window), tied=True),
        **_gemma(config),
        attention_softcap=_optional_float(config.get("attn_logit_softcapping", 50.0)),
        logits_softcap=_optional_float(config.get("final_logit_softcapping", 30.0)),
    )


def _gemma3_text(config: Config) -> DecoderConfig:
    window = int(config.get("sliding_window") or 4096)
    pattern = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    types = config.get("layer_types") or [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(_num_layers(config))
    ]
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError("Bidirectional attention is not supported.")
    ropes = config.get("rope_parameters") or {}
    if "full_attention" not in ropes:  # configs written before Transformers 5
        full = {"rope_theta": config.get("rope_theta", 1e6), **(config.get("rope_scaling") or {})}
        ropes = {"full_attention": full, "sliding_attention": {"rope_theta": config.get("rope_local_base_freq", 1e4)}}
    by_type = {kind: _rope(config, ropes[kind]) for kind in set(types)}
    common = _common({**config, "rope_parameters": None, "rope_scaling": None}, tied=True)
    return replace(
        common,
        **_gemma(config),
        layers=tuple(LayerConfig(by_type[kind], window if kind == "sliding_attention" else None) for kind in types),
        qk_norm=True,
        attention_softcap=_optional_float(config.get("attn_logit_softcapping")),
        logits_softcap=_optional_float(config.get("final_logit_softcapping")),
    )


def _gemma(config: Config) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    activation = config.get("hidden_activation") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise UnsupportedModelError(f"The activation {activation!r} is not supported for Gemma models.")
    bias = bool(config.get("attention_bias", False))
    return {
        "activation": "gelu_tanh",
        "attention_bias": bias,
        "attention_output_bias": bias,
        "norm_offset": 1.0,
        "output_norms": True,
        "embedding_scale": float(config["hidden_size"]) ** 0.5,
        "query_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
    }


def _common(config: Config, windows: Sequence[int | None] | None = None, tied: bool = False) -> DecoderConfig:
    """Shape and rotary embeddings; `windows` one per layer, `tied` what the family's configs mean by leaving it out."""
    num_heads = int(config["num_attention_heads"])
    hidden_size = int(config["hidden_size"])
    rope = _rope(config, config.get("rope_parameters") or config.get("rope_scaling") or {})
    num_layers = _num_layers(config)
    return DecoderConfig(
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(config["intermediate_size"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or hidden_size // num_heads),
        rms_norm_eps=float(config["rms_norm_eps"]),
        max_position_embeddings=int(config["max_position_embeddings"]),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", tied)),
        layers=tuple(LayerConfig(rope, window) for window in windows or [None] * num_layers),
    )


def _num_layers(config: Config) -> int:
    num_layers = int(config["num_hidden_layers"])
    if not 1 <= num_layers <= _MOST_LAYERS:
        raise UnsupportedModelError(f"The model's config.json asks for {num_layers} layers, not 1 to {_MOST_LAYERS}.")
    return num_layers


def _qwen_windows(config: Config) -> list[int | None]:
    if not config.get("use_sliding_window", False):
        return [None] * _num_layers(config)
    first_sliding = int(config.get("max_window_layers", 28))
    types = config.get("layer_types") or [
        "sliding_attention" if layer >= first_sliding else "full_attention" for layer in range(_num_layers(config))
    ]
    return _windows({**config, "layer_types": types}, config.get("sliding_window"))


def _windows(config: Config, window: Any, default_type: str = "full_attention") -> list[int | None]:
    """The sliding window of each layer, from `layer_types` where the config has them."""
    num_layers = _num_layers(config)
    types = config.get("layer_types") or [default_type] * num_layers
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(f"Layers of type {min(unknown)!r} are not supported.")
    if len(types) != num_layers:
        raise UnsupportedModelError(f"The model's config.json names {len(types)} layer types for {num_layers} layers.")
    if window is not None and int(window) < 1:
        raise UnsupportedModelError(f"A sliding window of {window} tokens is not possible.")
    return [int(window) if kind == "sliding_attention" and window is not None else None for kind in types]


def _rope(config: Config, entry: Config) -> Rope:
    """Base and scaling from an entry of `rope_parameters` (Transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    theta = float(entry.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = str(entry.get("rope_type") or entry.get("type") or "default")
    if float(entry.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError("Rotary embeddings over a part of the head are not supported.")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, RopeScaling(kind, factor=float(entry["factor"])))
    if kind == "llama3":
        return Rope(
            theta,
            RopeScaling(
                kind,
                factor=float(entry["factor"]),
                low_freq_factor=float(entry["low_freq_factor"]),
                high_freq_factor=float(entry["high_freq_factor"]),
                original_max_position_embeddings=int(entry["original_max_position_embeddings"]),
            ),
        )
    if kind == "yarn":
        return Rope(theta, _yarn(config, entry))
    if kind == "longrope":
        return Rope(theta, _longrope(config, entry))
    raise UnsupportedModelError(
        f"The rotary embedding type {kind!r} is not supported; use default, linear, llama3, yarn or longrope."
    )


def _yarn(config: Config, entry: Config) -> RopeScaling:
    """YaRN (arXiv 2309.00071); without an explicit attention factor, 0.1·ln(factor) + 1 (equation 22)."""
    original = int(entry.get("original_max_position_embeddings") or config["max_position_embeddings"])
    factor = float(entry["factor"])
    if entry.get("mscale") or entry.get("mscale_all_dim"):
        raise UnsupportedModelError("YaRN with mscale is not supported.")
    return RopeScaling(
        "yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=float(entry.get("beta_fast") or 32.0),
        beta_slow=float(entry.get("beta_slow") or 1.0),
        truncate=bool(entry.get("truncate", True)),
        attention_factor=float(entry.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)),
    )


def _longrope(config: Config, entry: Config) -> RopeScaling:
    """LongRoPE whose divisors are the same at every length: how the source of a GGUF file states Llama 3's scaling."""
    divisors = tuple(float(divisor) for divisor in entry["long_factor"])
    if divisors != tuple(float(divisor) for divisor in entry["short_factor"]):
        raise UnsupportedModelError("LongRoPE with other factors for long texts than for short ones is not supported.")
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))
    if len(divisors) != head_dim // 2 or min(divisors) <= 0:
        raise UnsupportedModelError(f"LongRoPE needs {head_dim // 2} positive factors for heads of {head_dim}.")
    return RopeScaling("divisors", attention_factor=float(entry["attention_factor"]), divisors=divisors)


def _want(config: Config, key: str, value: str, default: str) -> None:
    found = config.get(key, default)
    if found != value:
        raise UnsupportedModelError(f"The activation {found!r} is not supported for {config['model_type']} models.")


def _optional_float(value: Any) -> float | None:
    return None if value is None else float(value)


_FAMILIES: dict[str, Callable[[Config], DecoderConfig]] = {
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
