"""The decoder's layers for the native CPU step, where there is one for their shape."""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from anybit.engine.batch import BatchPlan
from anybit.engine.layers.linear import Linear, NestedLinear
from anybit.engine.layers.norm import RMSNorm
from anybit.engine.models.config import DecoderConfig
from anybit.engine.models.native_sealed import can_describe, describe_layer, parts_by_page
from anybit.kernels import fallbacks
from anybit.kernels.cpu.bindings import selected_instruction_set
from anybit.kernels.cpu.packed import PackedWeight
from anybit.kernels.cpu.stack import (
    DescribedPages,
    LayerStack,
    StackGroup,
    StackLayer,
    StackLinear,
    StackPages,
    StackShape,
)
from anybit.kvcache.pool import KVPool
from anybit.kvcache.sealed_pool import Seals

_QUICK_LOOKUPS = "avx512_vbmi"  # codes are looked up as bytes

if TYPE_CHECKING:
    from anybit.engine.models.decoder import DecoderLayer


class NativeLayers:
    """Runs all layers of a decoder in one native call, or one for each page that prompts of sealed formats reach into."""

    def __init__(self, stack: LayerStack, num_layers: int) -> None:
        self._stack = stack
        self._num_layers = num_layers
        self._pages: WeakKeyDictionary[KVPool, DescribedPages] = WeakKeyDictionary()

    def can_read(self, pool: KVPool) -> bool:
        """Whether the native step knows the pages' formats."""
        return all(can_describe(layer) for sealed in pool.sealed.values() for layer in sealed.layers)

    def gains_by_pairs(self) -> bool:
        """Whether pages of ordered pairs are read as quickly as exact ones; with narrower vectors they are not."""
        return selected_instruction_set() == _QUICK_LOOKUPS

    def __call__(self, hidden: Tensor, plan: BatchPlan, pool: KVPool) -> Tensor:
        """float32 [rows, hidden] -> the same tensor, after all layers."""
        pages = self._described(pool)
        if not plan.sealed:
            groups = [StackGroup(group.row_ids, group.block_tables) for group in plan.attention_groups]
            return self._stack.run(
                hidden, plan.positions, plan.page_ids, plan.page_offsets, plan.segments, groups, pages
            )
        for part in parts_by_page(plan, list(pool.sealed)):
            rows = part.row_ids
            is_all = len(rows) == len(hidden)
            computed = self._stack.run(
                hidden if is_all else hidden[rows],
                plan.positions[rows],
                plan.page_ids[rows],
                plan.page_offsets[rows],
                part.segments,
                part.groups,
                pages,
                part.row_formats,
            )
            if not is_all:
                hidden[rows] = computed
            for kv_format, seals in part.seals:
                self.seal(pool, kv_format, seals)
        return hidden

    def seal(self, pool: KVPool, kv_format: str, seals: Seals) -> None:
        """What `KVPool.seal` does, natively."""
        sealed = pool.sealed[kv_format]
        with sealed.clock.running():
            self._stack.seal(seals.slots, seals.page_ids, list(pool.sealed).index(kv_format), self._described(pool))
            for index, layer in enumerate(sealed.layers if len(seals.first_slots) else ()):
                keys, values = pool.keys(index)[seals.first_slots], pool.values(index)[seals.first_slots]
                layer.pages.keep_exactly(seals.first_page_ids, keys, values)

    def _described(self, pool: KVPool) -> DescribedPages:
        pages = self._pages.get(pool)
        if pages is None:
            pages = self._pages[pool] = self._stack.describe_pages(
                [self._layer_pages(pool, i) for i in range(self._num_layers)]
            )
        return pages

    def _layer_pages(self, pool: KVPool, layer: int) -> StackPages:
        sealed = [describe_layer(of_format.layers[layer]) for of_format in pool.sealed.values()]
        return StackPages(pool.keys(layer), pool.values(layer), sealed)


def native_layers(config: DecoderConfig, layers: Sequence["DecoderLayer"], dtype: torch.dtype) -> NativeLayers | None:
    """None where a weight is not in the native order, or rows are not whole vectors."""
    shape = StackShape(
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.activation,
        config.rms_norm_eps,
        config.attention_scale,
        config.attention_softcap,
    )
    described = [_describe(config, index, layer) for index, layer in enumerate(layers)]
    stack_layers = [layer for layer in described if layer is not None]
    if len(stack_layers) != len(layers) or dtype != torch.float32:
        return None
    if not shape.is_supported:
        fallbacks.record("decoder_stack", "rows or heads of this model are not whole vectors, so layers run one by one")
        return None
    return NativeLayers(LayerStack(shape, stack_layers), len(layers))


def _describe(config: DecoderConfig, index: int, layer: "DecoderLayer") -> StackLayer | None:
    attention, mlp = layer.attention, layer.mlp
    qkv, output, gate_up, down = map(_linear, (attention.qkv, attention.output, mlp.gate_up, mlp.down))
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    return StackLayer(
        attention_norm=layer.attention_norm.weight,
        mlp_norm=layer.mlp_norm.weight,
        attention_output_norm=_weight(layer.attention_output_norm),
        mlp_output_norm=_weight(layer.mlp_output_norm),
        query_norm=_weight(attention.query_norm),
        key_norm=_weight(attention.key_norm),
        cosines=attention.rotary.cosines,
        sines=attention.rotary.sines,
        qkv=qkv,
        output=output,
        gate_up=gate_up,
        down=down,
        window=config.layers[index].sliding_window,
    )


def _linear(linear: Linear) -> StackLinear | None:
    if isinstance(linear, NestedLinear) and isinstance(linear.weight, PackedWeight):
        return StackLinear(linear.weight, linear.bias)
    return None


def _weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight
