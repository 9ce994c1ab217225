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
from anybit.kernels.attention_inputs import AttentionSettings
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

    @property
    def settings(self) -> AttentionSettings:
        config = self.config
        return AttentionSettings(
            config.attention_scale, config.layers[self.layer].sliding_window, config.attention_softcap
        )

    def __call__(self, x: Tensor, plan: BatchPlan, pool: KVPool) -> Tensor:
        """[rows, hidden] -> [rows, hidden]; writes the rows' keys and values to their pages first."""
        q, k, v = self.heads(x, plan)
        layers = [pool.sealed[rows.kv_format].layers[self.layer] for rows in plan.sealed]
        for rows, sealed in zip(plan.sealed, layers, strict=True):
            k[rows.row_ids] = sealed.basis.keys(k[rows.row_ids].transpose(0, 1)).transpose(0, 1).to(k.dtype)
            v[rows.row_ids] = sealed.basis.values(v[rows.row_ids]).to(v.dtype)
        pool.write(self.layer, plan.page_ids, plan.page_offsets, k, v)
        settings = self.settings
        attended = torch.empty_like(q)
        for group in plan.attention_groups:
            attended[group.row_ids] = dispatch.paged_attention(
                q[group.row_ids],
                pool.keys(self.layer),
                pool.values(self.layer),
                group.block_tables,
                group.positions,
                settings.scale,
                window=settings.window,
                softcap=settings.softcap,
            )
        own = pool.exact(self.layer)
        for rows, sealed in zip(plan.sealed, layers, strict=True):
            if rows.seals is not None:
                pool.sealed[rows.kv_format].seal_layer(self.layer, own, rows.seals)
            for part in rows.groups:
                of_part = sealed.attend(q[part.row_ids], own, part.tables, part.positions, settings)
                attended[part.row_ids] = of_part.to(q.dtype)
        return self.output(attended.view(x.shape[0], -1), plan.segments)

    def heads(self, x: Tensor, plan: BatchPlan) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention sees them: [rows, heads or kv_heads, head_dim]."""
        config = self.config
        heads = self.qkv(x, plan.segments).view(x.shape[0], -1, config.head_dim)
        q, k, v = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return self.rotary.rotate(q, plan.positions), self.rotary.rotate(k, plan.positions), v
