"""One transformer block as a differentiable function of its weights, over whole sequences and without a cache.

The served layers read pages and codes and cannot be differentiated; calibration needs a block's inputs and gradients.
Same arithmetic as `engine.layers`, from the same configuration.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.models.config import DecoderConfig
from anybit.engine.weights.source import SourceModel


@dataclass(frozen=True, slots=True)
class Site:
    """A place where one input feeds one or several linears, in the order in which they are stacked."""

    name: str
    linears: tuple[str, ...]

    def weight_names(self, layer: int) -> list[str]:
        return [f"model.layers.{layer}.{linear}.weight" for linear in self.linears]

    def rows(self, config: DecoderConfig) -> list[int]:
        """Outputs of each linear."""
        return [config.outputs_of(linear.split(".")[-1]) for linear in self.linears]


SITES = (
    Site("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Site("o", ("self_attn.o_proj",)),
    Site("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    Site("down", ("mlp.down_proj",)),
)
"""In the order of computation."""

_SHORT = 512
"""Tokens up to which a CPU's caches hold a sequence's scores."""

Linears = Mapping[str, Tensor]
"""Site name -> stacked weight, [out, in]."""
Vectors = Mapping[str, Tensor]
"""Norm weights and biases of one block, by their names within it; norm offsets are already added."""
Tap = Callable[[str, Tensor], None]
"""Called with a site's name and its input [sequences, tokens, in]."""


def norm_names(config: DecoderConfig) -> tuple[str, str]:
    """The norms before attention and before the feed-forward block."""
    before_mlp = "pre_feedforward_layernorm.weight" if config.output_norms else "post_attention_layernorm.weight"
    return "input_layernorm.weight", before_mlp


class Block:
    """A layer of a decoder: hidden states in and out, [sequences, tokens, hidden_size]."""

    def __init__(self, config: DecoderConfig, layer: int, rotary: RotaryEmbedding) -> None:
        self.config = config
        self.layer = layer
        self._rotary = rotary
        self._window = config.layers[layer].sliding_window
        self.norm_names = norm_names(config)

    def __call__(self, hidden: Tensor, linears: Linears, vectors: Vectors, tap: Tap | None = None) -> Tensor:
        def linear(site: Site, x: Tensor) -> Tensor:
            if tap is not None:
                tap(site.name, x)
            return F.linear(x, linears[site.name], vectors.get(f"{site.name}.bias"))

        qkv, output, gate_up, down = SITES
        attention_norm, mlp_norm = self.norm_names
        attended = linear(output, self._attend(linear(qkv, self._norm(hidden, vectors, attention_norm)), vectors))
        if self.config.output_norms:
            attended = self._norm(attended, vectors, "post_attention_layernorm.weight")
        hidden = hidden + attended
        gate, up = linear(gate_up, self._norm(hidden, vectors, mlp_norm)).chunk(2, dim=-1)
        activated = F.silu(gate) if self.config.activation == "silu" else F.gelu(gate, approximate="tanh")
        fed = linear(down, activated * up)
        if self.config.output_norms:
            fed = self._norm(fed, vectors, "post_feedforward_layernorm.weight")
        return hidden + fed

    def _norm(self, x: Tensor, vectors: Vectors, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), vectors[name], self.config.rms_norm_eps)

    def heads(self, qkv: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention sees them, rotated by position: [sequences, heads, tokens, head_dim].

        qkv [sequences, tokens, (heads + 2 kv_heads)·head_dim], the output of the stacked projection.
        """
        config = self.config
        sequences, tokens, _ = qkv.shape
        heads = qkv.view(sequences, tokens, -1, config.head_dim)
        q_and_k, v = torch.split(heads, [config.num_heads + config.num_kv_heads, config.num_kv_heads], dim=2)
        if config.qk_norm:
            q, k = torch.split(q_and_k, [config.num_heads, config.num_kv_heads], dim=2)
            q = self._norm(q, vectors, "self_attn.q_norm.weight")
            k = self._norm(k, vectors, "self_attn.k_norm.weight")
            q_and_k = torch.cat((q, k), dim=2)
        rotated: Tensor = _Rotate.apply(  # type: ignore[no-untyped-call]
            q_and_k, self._rotary.cosines[:tokens, None], self._rotary.sines[:tokens, None]
        )
        q, k = torch.split(rotated, [config.num_heads, config.num_kv_heads], dim=2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _attend(self, qkv: Tensor, vectors: Vectors) -> Tensor:
        config = self.config
        q, k, v = self.heads(qkv, vectors)
        tokens = q.shape[2]
        repeat = config.num_heads // config.num_kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        is_plain = config.attention_softcap is None and (self._window is None or self._window >= tokens)
        if is_plain and not _is_differentiated_in_full(q):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=config.attention_scale)
        else:
            attended = self._masked_attention(q, k, v)
        return attended.transpose(1, 2).flatten(2)

    def _masked_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        scores = q @ k.transpose(2, 3) * self.config.attention_scale
        cap = self.config.attention_softcap
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        # Adding is differentiated in less time than filling.
        return torch.softmax(scores + _mask(tokens, self._window or tokens, scores.dtype, q.device), -1) @ v


class _Rotate(torch.autograd.Function):
    """`RotaryEmbedding.rotate` of x [sequences, tokens, heads, head_dim]; a gradient is rotated back, and nothing kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(x, cosines, sines)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(gradient, cosines, -sines), None, None


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.to(torch.float32).chunk(2, dim=-1)
    rotated = torch.empty_like(x, memory_format=torch.contiguous_format)
    into_first, into_second = rotated.chunk(2, dim=-1)
    into_first.copy_((first * cosines).sub_(second * sines))
    into_second.copy_((second * cosines).add_(first * sines))
    return rotated


@functools.lru_cache(maxsize=4)
def _mask(tokens: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zero where a query sees a key, else minus infinity: [tokens, tokens]."""
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    unseen = (distance < 0) | (distance >= window)
    return torch.zeros_like(distance, dtype=dtype).masked_fill_(unseen, float("-inf"))


def _is_differentiated_in_full(q: Tensor) -> bool:
    """Whether all scores of q [sequences, heads, tokens, head_dim] are formed: a CPU's gradients take half the time so."""
    return q.device.type == "cpu" and q.requires_grad and q.shape[2] <= _SHORT


def load_linears(source: SourceModel, layer: int, device: torch.device) -> dict[str, Tensor]:
    """The float weights of a block, stacked per site: float32."""
    return {
        site.name: torch.cat([source.tensor(name).to(device, torch.float32) for name in site.weight_names(layer)])
        for site in SITES
    }


def load_vectors(source: SourceModel, config: DecoderConfig, layer: int, device: torch.device) -> dict[str, Tensor]:
    """The norms and stacked biases of a block: float32."""
    prefix = f"model.layers.{layer}."
    names = {name.removeprefix(prefix) for name in source.tensor_names() if name.startswith(prefix)}
    vectors = {
        name: source.tensor(prefix + name).to(device, torch.float32) + config.norm_offset
        for name in names
        if name.endswith("norm.weight")
    }
    for site in SITES:
        biases = [f"{linear}.bias" for linear in site.linears]
        if biases[0] in names:
            vectors[f"{site.name}.bias"] = torch.cat(
                [source.tensor(prefix + bias).to(device, torch.float32) for bias in biases]
            )
    return vectors
