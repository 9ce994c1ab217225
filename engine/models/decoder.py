"""A pre-norm decoder-only transformer. Families differ by DecoderConfig, not by code."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from anybit.engine.batch import BatchPlan
from anybit.engine.layers.attention import Attention
from anybit.engine.layers.embedding import VocabularyTable
from anybit.engine.layers.linear import Linear
from anybit.engine.layers.mlp import GatedMLP
from anybit.engine.layers.norm import RMSNorm
from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.models.config import DecoderConfig
from anybit.kvcache.pool import KVPool


class WeightLoader(Protocol):
    """Gives a decoder its weights by their Hugging Face names, one at a time."""

    def linear(self, prefixes: Sequence[str], bias: bool) -> Linear:
        """One linear layer, or several that share their input stacked along the output."""
        ...

    def vocabulary(self, prefix: str) -> VocabularyTable: ...

    def vector(self, name: str) -> Tensor:
        """A float32 vector such as a norm's weight."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    def __call__(self, hidden: Tensor, plan: BatchPlan, pool: KVPool) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), plan, pool)
        return hidden + self.mlp(self.mlp_norm(hidden), plan.segments)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Token ids and a batch plan in, logits of the wanted rows out."""

    config: DecoderConfig
    embedding: VocabularyTable
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: VocabularyTable
    dtype: torch.dtype
    device: torch.device

    @torch.inference_mode()
    def forward(self, plan: BatchPlan, pool: KVPool) -> Tensor:
        """Compute the plan's rows, extend the KV cache by them, return float32 logits [len(plan.logits_rows), vocab]."""
        hidden = self.embedding.embed(plan.token_ids).to(self.dtype)
        for layer in self.layers:
            hidden = layer(hidden, plan, pool)
        if plan.logits_rows.numel() == 0:  # no sequence is complete yet: a long prompt's first chunks
            return torch.empty(0, self.config.vocab_size, device=self.device)
        return self.head.logits(self.norm(hidden[plan.logits_rows])).to(torch.float32)


def build_decoder(
    config: DecoderConfig,
    loader: WeightLoader,
    max_positions: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Assemble a decoder from a loader; linears that share an input are fused (q/k/v, gate/up)."""
    rotary = RotaryEmbedding(config, max_positions, device)

    def norm(name: str) -> RMSNorm:
        return RMSNorm(loader.vector(f"{name}.weight"), config.rms_norm_eps)

    def layer(index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        qkv = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
        return DecoderLayer(
            attention_norm=norm(f"{prefix}.input_layernorm"),
            attention=Attention(
                config,
                index,
                qkv=loader.linear(qkv, config.attention_bias),
                output=loader.linear([f"{prefix}.self_attn.o_proj"], config.attention_output_bias),
                rotary=rotary,
            ),
            mlp_norm=norm(f"{prefix}.post_attention_layernorm"),
            mlp=GatedMLP(
                gate_up=loader.linear([f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"], config.mlp_bias),
                down=loader.linear([f"{prefix}.mlp.down_proj"], config.mlp_bias),
            ),
        )

    embedding = loader.vocabulary("model.embed_tokens")
    layers = tuple(layer(index) for index in range(config.num_layers))
    head = embedding if config.tie_word_embeddings else loader.vocabulary("lm_head")
    return Decoder(config, embedding, layers, norm("model.norm"), head, dtype, torch.device(device))
