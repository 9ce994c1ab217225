"""Self-attention over the paged KV cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.engine.batch import BatchPlan
from anybit.engine.layers.linear import Linear
from anybit.engine.layers.norm import RMSNorm
from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.models.config import DecoderConfig
from anybit.kernels import dispatch
from anybit.kvcache.pool import KVPool


@dataclass(frozen=True, slots=True)
class Attention:
    """q/k/v projection, norms of q and k where the model has them, rotation, KV write, attention, output projection."""

    config: DecoderConfig
    layer: int
    qkv: Linear
    output: Linear
    rotary: RotaryEmbedding
    query_norm: RMSNorm | None = None
    key_norm: RMSNorm | None = None

    def __call__(self, x: Tensor, plan: BatchPlan, pool: KVPool) -> Tensor:
        """[rows, hidden] -> [rows, hidden]; writes the rows' keys and values to their pages first."""
        config = self.config
        heads = self.qkv(x, plan.segments).view(x.shape[0], -1, config.head_dim)
        q, k, v = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q = self.rotary.rotate(q, plan.positions)
        pool.write(self.layer, plan.page_ids, plan.page_offsets, self.rotary.rotate(k, plan.positions), v)
        attended = torch.empty_like(q)
        for group in plan.attention_groups:
            attended[group.row_ids] = dispatch.paged_attention(
                q[group.row_ids],
                pool.keys(self.layer),
                pool.values(self.layer),
                group.block_tables,
                group.positions,
                config.attention_scale,
                window=config.layers[self.layer].sliding_window,
                softcap=config.attention_softcap,
            )
        return self.output(attended.view(x.shape[0], -1), plan.segments)
