"""Reads a Hugging Face config.json into a DecoderConfig, or says in one sentence why it cannot."""

from collections.abc import Callable, Mapping
from typing import Any

from anybit.engine.errors import UnsupportedModelError
from anybit.engine.models.config import DecoderConfig, RopeScaling

Config = Mapping[str, Any]


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
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"The activation {activation!r} is not supported for Llama models.")
    num_heads = int(config["num_attention_heads"])
    hidden_size = int(config["hidden_size"])
    attention_bias = bool(config.get("attention_bias", False))
    theta, scaling = _rope(config)
    return DecoderConfig(
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or hidden_size // num_heads),
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=theta,
        max_position_embeddings=int(config["max_position_embeddings"]),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_scaling=scaling,
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _rope(config: Config) -> tuple[float, RopeScaling]:
    """Base and scaling from `rope_parameters` (Transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    entry: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(entry.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = str(entry.get("rope_type") or entry.get("type") or "default")
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling(kind, factor=float(entry["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            kind,
            factor=float(entry["factor"]),
            low_freq_factor=float(entry["low_freq_factor"]),
            high_freq_factor=float(entry["high_freq_factor"]),
            original_max_position_embeddings=int(entry["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(f"The rotary embedding type {kind!r} is not supported; use default, linear or llama3.")


_FAMILIES: dict[str, Callable[[Config], DecoderConfig]] = {"llama": _llama}
