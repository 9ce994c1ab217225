"""Attention on an NVIDIA GPU over a pool's pages, exact and sealed, with the write of keys and values to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.engine.batch import AttentionGroup, BatchPlan
from anybit.engine.kv.sealed_batch import SealedGroup, SealedRows
from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.kernels import dispatch, fallbacks
from anybit.kernels.attention_inputs import AttentionSettings
from anybit.kernels.cuda.attention import attend_splits, can_attend
from anybit.kernels.cuda.heads import HeadNorms, LayerBases, ProjectedHeads, RowPlaces, rotate_and_store
from anybit.kernels.cuda.sealed_attention import (
    SealedRecords,
    SealedTables,
    attend_sealed,
    attend_sealed_splits,
    can_attend_sealed,
)
from anybit.kernels.cuda.split_attention import SplitAttention
from anybit.kvcache.attention import attend
from anybit.kvcache.gpu_records import sealed_records
from anybit.kvcache.pool import KVPool
from anybit.kvcache.sealed_pool import SealedLayer, SealedPool


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What one layer does to heads before attention, and how they attend."""

    head_dim: int
    norms: HeadNorms | None
    rotary: RotaryEmbedding
    settings: AttentionSettings


@dataclass(frozen=True, slots=True)
class _SealedPart:
    pool: SealedPool
    layer: SealedLayer
    records: SealedRecords | None  # None: no kernel reads this format


class CudaAttention:
    """One layer's attention over one pool."""

    def __init__(self, heads: HeadSpec, layer: int, pool: KVPool, dtype: torch.dtype) -> None:
        self._heads = heads
        self._layer = layer
        self._own = pool.exact(layer)
        self._dtype = dtype
        self._sealed = {name: self._describe(sealed) for name, sealed in pool.sealed.items()}
        self._bases: dict[tuple[str, ...], LayerBases] = {}

    @property
    def has_kernels(self) -> bool:
        """Whether all pages have a kernel: what takes its place can neither be captured nor is it exact."""
        return can_attend(self._dtype, self._own.keys) and all(
            part.records is not None for part in self._sealed.values()
        )

    def splits(self, qkv: Tensor, plan: BatchPlan) -> SplitAttention | None:
        """Where each row is the only token of its sequence, in their order, and all are of one format; else None."""
        rows = len(qkv)
        if not plan.sealed:
            exact = plan.attention_groups[0]
            by_row = _is_by_row(exact.row_ids, rows) and can_attend(qkv.dtype, self._own.keys)
            return self._exact_splits(self._projected(qkv, plan), exact) if by_row else None
        sealed = plan.sealed[0]
        part = self._sealed[sealed.kv_format]
        if plan.attention_groups or len(plan.sealed) > 1 or part.records is None:
            return None
        group = sealed.groups[0]
        if not _is_by_row(group.row_ids, rows):
            return None
        projected = self._projected(qkv, plan)
        queries: Tensor | ProjectedHeads = projected
        if sealed.seals is not None:  # with the newest keys and values
            queries = rotate_and_store(projected)[:, None]
            self._seal(part, sealed)
        arguments = (queries, part.records, self._own, _tables(group), group.positions, self._heads.settings)
        return attend_sealed_splits(*arguments, just_sealed=sealed.seals is not None)

    def __call__(self, qkv: Tensor, plan: BatchPlan) -> Tensor:
        """qkv as projected -> [rows, heads, head_dim], in the model's basis.

        Keys and values go to their pages, and full pages are sealed first.
        """
        q = rotate_and_store(self._projected(qkv, plan))
        attended = torch.empty_like(q)
        for group in plan.attention_groups:
            if _is_by_row(group.row_ids, len(q)) and can_attend(q.dtype, self._own.keys):
                self._exact_splits(q[:, None], group).merged(attended)
            else:
                attended[group.row_ids] = dispatch.paged_attention(q[group.row_ids], *self._exact_arguments(group))
        for rows in plan.sealed:
            part = self._sealed[rows.kv_format]
            self._seal(part, rows)
            for sealed_group in rows.groups:
                self._attend_sealed(q, part, sealed_group, attended, rows.seals is not None)
        return attended

    def _projected(self, qkv: Tensor, plan: BatchPlan) -> ProjectedHeads:
        """qkv [rows, (heads + 2·kv_heads)·head_dim], as projected."""
        heads = self._heads
        return ProjectedHeads(
            qkv.view(len(qkv), -1, heads.head_dim),
            RowPlaces(plan.positions, plan.page_ids, plan.page_offsets, plan.row_formats),
            heads.rotary.cosines,
            heads.rotary.sines,
            self._own.keys,
            self._own.values,
            heads.norms,
            self._bases_of(tuple(rows.kv_format for rows in plan.sealed)),
        )

    def _exact_splits(self, queries: Tensor | ProjectedHeads, group: AttentionGroup) -> SplitAttention:
        return attend_splits(queries, *self._exact_arguments(group))

    def _exact_arguments(
        self, group: AttentionGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, float, int | None, float | None]:
        """Of attention over exact pages, after the queries."""
        own, settings = self._own, self._heads.settings
        pages = (own.keys, own.values, group.block_tables, group.positions)
        return *pages, settings.scale, settings.window, settings.softcap

    def _seal(self, part: _SealedPart, rows: SealedRows) -> None:
        if rows.seals is not None:
            part.pool.seal_layer(self._layer, self._own, rows.seals)

    def _attend_sealed(
        self, q: Tensor, part: _SealedPart, group: SealedGroup, attended: Tensor, just_sealed: bool
    ) -> None:
        by_row = _is_by_row(group.row_ids, len(q))
        queries = q[:, None] if by_row else q[group.row_ids]
        settings = self._heads.settings
        if part.records is None:
            pages, basis = part.layer.pages, part.layer.basis
            result = attend(queries, self._own, pages, group.tables, group.positions, settings)
            attended[group.row_ids] = basis.restored_values(result).to(q.dtype)
            return
        result = attended[:, None] if by_row else torch.empty_like(queries)
        tables, positions = _tables(group), group.positions
        attend_sealed(queries, part.records, self._own, tables, positions, settings, result, just_sealed)
        if not by_row:
            attended[group.row_ids] = result

    def _describe(self, pool: SealedPool) -> _SealedPart:
        layer, keys = pool.layers[self._layer], self._own.keys
        records = None
        if can_attend_sealed(self._dtype, keys.shape[-1], keys.device):
            records = sealed_records(layer.pages, layer.basis)
        if records is None:
            fallbacks.record(
                "sealed_attention", "no kernel reads this format or head size, so attention is computed step by step"
            )
        return _SealedPart(pool, layer, records)

    def _bases_of(self, formats: tuple[str, ...]) -> LayerBases | None:
        if not formats:
            return None
        bases = self._bases.get(formats)
        if bases is None:
            of_formats = [self._sealed[name].layer.basis for name in formats]
            weights = next((basis.weights for basis in of_formats if basis.weights is not None), None)
            bases = self._bases[formats] = LayerBases(
                of_formats[0].signs,
                None if weights is None else weights.contiguous(),
                tuple(basis.rotates_keys for basis in of_formats),
                tuple(basis.rotates_values for basis in of_formats),
            )
        return bases


def _is_by_row(row_ids: Tensor, rows: int) -> bool:
    """Whether a group is one token of each sequence, in the order of the rows."""
    return row_ids.shape == (rows, 1)


def _tables(group: SealedGroup) -> SealedTables:
    return SealedTables(group.tables.sealed, group.tables.first, group.tables.own)


def attention_layers(heads: Sequence[HeadSpec], pool: KVPool, dtype: torch.dtype) -> list[CudaAttention]:
    return [CudaAttention(spec, layer, pool, dtype) for layer, spec in enumerate(heads)]
