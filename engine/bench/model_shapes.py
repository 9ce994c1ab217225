"""Shapes of well-known models, to be filled with random weights. Loads no torch."""

from dataclasses import replace

from anybit.engine.models.config import DecoderConfig, LayerConfig, Rope

_LAYER = LayerConfig(Rope(5e5))
_LLAMA_8B = DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
    layers=(_LAYER,) * 32,
)

MODELS = {
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3.2-1b": replace(
        _LLAMA_8B,
        hidden_size=2048,
        intermediate_size=8192,
        head_dim=64,
        tie_word_embeddings=True,
        layers=(_LAYER,) * 16,
    ),
    "qwen3-4b": replace(
        _LLAMA_8B,
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        tie_word_embeddings=True,
        layers=(_LAYER,) * 36,
        qk_norm=True,
    ),
}
