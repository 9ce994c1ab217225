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
from anybit.engine.models.cuda_layers import CudaLayers, cuda_layers
from anybit.engine.models.native import NativeLayers, native_layers
from anybit.kernels import dispatch, fallbacks
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
    """Attention and feed-forward block with a norm before each and, in some families, one after each."""

    attention_norm: RMSNorm
    attention: Attention
    attention_output_norm: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: GatedMLP
    mlp_output_norm: RMSNorm | None

    def __call__(self, hidden: Tensor, plan: BatchPlan, pool: KVPool) -> Tensor:
        attended = self.attention(self.attention_norm(hidden), plan, pool)
        hidden = hidden + (attended if self.attention_output_norm is None else self.attention_output_norm(attended))
        fed = self.mlp(self.mlp_norm(hidden), plan.segments)
        return hidden + (fed if self.mlp_output_norm is None else self.mlp_output_norm(fed))


@dataclass(frozen=True, slots=True)
class Decoder:
    """Token ids and a batch plan in, hidden states out; logits of the wanted rows from those."""

    config: DecoderConfig
    embedding: VocabularyTable
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: VocabularyTable
    dtype: torch.dtype
    device: torch.device
    native: NativeLayers | CudaLayers | None = None  # all layers in one call, where that is possible

    def forward(self, plan: BatchPlan, pool: KVPool) -> Tensor:
        """Compute the plan's rows, extend the KV cache by them, return their last hidden states [rows, hidden_size]."""
        hidden = self.embed(plan.token_ids)
        if self.native is not None and self.native.can_read(pool):
            return self.native(hidden, plan, pool)
        if (
            self.native is not None
        ):  # also for rows of exact formats, whose bits must not depend on the rows beside them
            fallbacks.record(
                "sealed_attention", "what computes all layers in one call does not read pages of this format"
            )
        hidden = hidden.to(self.dtype)
        for layer in self.layers:
            hidden = layer(hidden, plan, pool)
        return hidden

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [rows] -> float32 [rows, hidden_size], which the first layer takes."""
        hidden = self.embedding.embed(token_ids)
        if self.config.embedding_scale != 1:
            hidden.mul_(self.config.embedding_scale)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [rows, hidden_size] of `forward` to float32 logits [rows, vocab]."""
        logits = self.head.logits(self.norm(hidden)).to(torch.float32)
        cap = self.config.logits_softcap
        return logits if cap is None else dispatch.softcap(logits, cap)


def build_decoder(
    config: DecoderConfig,
    loader: WeightLoader,
    max_positions: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    is_fast: bool = False,
) -> Decoder:
    """Assemble a decoder from a loader; linears that share an input are fused (q/k/v, gate/up).

    `is_fast` permits results of a row to depend on the rows beside it where that is faster (on a GPU).
    """
    rotary = {
        rope: RotaryEmbedding(rope, config.head_dim, max_positions, device)
        for rope in {layer.rope for layer in config.layers}
    }

    def norm(name: str) -> RMSNorm:
        return RMSNorm(loader.vector(f"{name}.weight") + config.norm_offset, config.rms_norm_eps)

    def layer(index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        qkv = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
        # Families with output norms call the one before the feed-forward block otherwise.
        before_mlp = "pre_feedforward_layernorm" if config.output_norms else "post_attention_layernorm"
        return DecoderLayer(
            attention_norm=norm(f"{prefix}.input_layernorm"),
            attention=Attention(
                config,
                index,
                qkv=loader.linear(qkv, config.attention_bias),
                output=loader.linear([f"{prefix}.self_attn.o_proj"], config.attention_output_bias),
                rotary=rotary[config.layers[index].rope],
                query_norm=norm(f"{prefix}.self_attn.q_norm") if config.qk_norm else None,
                key_norm=norm(f"{prefix}.self_attn.k_norm") if config.qk_norm else None,
            ),
            attention_output_norm=norm(f"{prefix}.post_attention_layernorm") if config.output_norms else None,
            mlp_norm=norm(f"{prefix}.{before_mlp}"),
            mlp=GatedMLP(
                gate_up=loader.linear([f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"], config.mlp_bias),
                down=loader.linear([f"{prefix}.mlp.down_proj"], config.mlp_bias),
                activation=dispatch.ACTIVATIONS[config.activation],
            ),
            mlp_output_norm=norm(f"{prefix}.post_feedforward_layernorm") if config.output_norms else None,
        )

    embedding = loader.vocabulary("model.embed_tokens")
    layers = tuple(layer(index) for index in range(config.num_layers))
    head = embedding if config.tie_word_embeddings else loader.vocabulary("lm_head")
    native = native_layers(config, layers, dtype) or cuda_layers(config, layers, dtype, is_fast)
    return Decoder(config, embedding, layers, norm("model.norm"), head, dtype, torch.device(device), native)
