"""What distinguishes one decoder-only model from another, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings. `kind` is "default", "linear", "llama3", "yarn" or "divisors"."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # yarn, divisors: factor on sines and cosines
    divisors: tuple[float, ...] = ()  # one per frequency


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embeddings of a layer: base and scaling."""

    theta: float
    scaling: RopeScaling = RopeScaling()


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer."""

    rope: Rope
    sliding_window: int | None = None  # a query sees this many tokens, itself included; None: all before it


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape and switches of a decoder; families are rows of `models.registry` that fill this in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    layers: tuple[LayerConfig, ...]
    activation: str = "silu"  # or "gelu_tanh"
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # a norm over head_dim on queries and keys before the rotation
    norm_offset: float = 0.0  # added to every norm's weight
    output_norms: bool = False  # a norm after attention and one after the feed-forward block too
    embedding_scale: float = 1.0
    query_scale: float | None = None  # instead of head_dim^-1/2
    attention_softcap: float | None = None  # cap·tanh(score/cap)
    logits_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def outputs_of(self, linear: str) -> int:
        """Rows of one of a layer's weights, by the last part of its Hugging Face name, such as "q_proj"."""
        return {
            "q_proj": self.num_heads * self.head_dim,
            "k_proj": self.num_kv_heads * self.head_dim,
            "v_proj": self.num_kv_heads * self.head_dim,
            "o_proj": self.hidden_size,
            "gate_proj": self.intermediate_size,
            "up_proj": self.intermediate_size,
            "down_proj": self.hidden_size,
        }[linear]

    @property
    def attention_scale(self) -> float:
        return float(self.head_dim**-0.5) if self.query_scale is None else self.query_scale
