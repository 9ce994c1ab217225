"""What distinguishes one decoder-only model from another, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings. `kind` is "default", "linear" or "llama3"."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape and switches of a decoder; families are rows of `models.registry` that fill this in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: RopeScaling = RopeScaling()
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False

    @property
    def attention_scale(self) -> float:
        return float(self.head_dim**-0.5)
