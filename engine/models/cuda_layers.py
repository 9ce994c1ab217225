"""The decoder's layers on an NVIDIA GPU, with what lies between two products in one launch each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from anybit.engine.batch import BatchPlan
from anybit.engine.layers.norm import RMSNorm
from anybit.engine.models.config import DecoderConfig
from anybit.engine.models.cuda_attention import CudaAttention, HeadSpec, attention_layers
from anybit.engine.models.cuda_products import Product, Rows, product_of
from anybit.kernels import dispatch, fallbacks
from anybit.kernels.cuda.activations import (
    Activations,
    Addition,
    add_norm_prepare,
    add_residual,
    prepare_activations,
    rms_norm,
)
from anybit.kernels.cuda.driver import only_compiling
from anybit.kernels.cuda.heads import MOST_FORMATS, HeadNorms
from anybit.kernels.cuda.linear import mixed_alignment
from anybit.kernels.cuda.sealed_attention import can_attend_sealed
from anybit.kernels.widths import RowWidths
from anybit.kvcache.pool import KVPool

if TYPE_CHECKING:
    from anybit.engine.models.decoder import DecoderLayer

_HEAD_DIM_MULTIPLE = 64


def _parts(plan: BatchPlan) -> list[Rows]:
    if plan.row_widths is not None:
        return [Rows(0, len(plan.token_ids), plan.row_widths)]
    return [Rows(start, stop, width) for width, start, stop in plan.segments]


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: RMSNorm
    mlp_norm: RMSNorm
    attention_output_gain: Tensor | None
    mlp_output_gain: Tensor | None
    heads: HeadSpec
    qkv: Product
    output: Product
    gate_up: Product
    down: Product


class CudaLayers:
    """Runs all layers; the residual stream stays float32, what passes between kernels has the decoder's dtype.

    Without `is_fast` a row's result depends on that row alone. With it, many rows are multiplied in bfloat16 (prompts by the
    library), in an order of sums that depends on their number.
    """

    def __init__(self, config: DecoderConfig, layers: Sequence[_Layer], dtype: torch.dtype, is_fast: bool) -> None:
        self._config = config
        self._layers = layers
        self._dtype = dtype
        self.is_fast = is_fast
        self._attention: WeakKeyDictionary[KVPool, list[CudaAttention]] = WeakKeyDictionary()

    def __call__(self, hidden: Tensor, plan: BatchPlan, pool: KVPool) -> Tensor:
        """float32 [rows, hidden] -> the same tensor, after all layers."""
        addition: Addition | None = None
        parts = _parts(plan)
        for layer, attention in zip(self._layers, self._attention_over(pool), strict=True):
            qkv = self._normed(hidden, addition, layer.attention_norm, layer.qkv, parts)
            output = self._attended(qkv, attention, layer, plan, parts)
            addition = Addition(output, layer.attention_output_gain)
            gate_up = self._normed(hidden, addition, layer.mlp_norm, layer.gate_up, parts)
            down = self._multiplied(gate_up, self._config.activation, layer.down, parts)
            addition = Addition(down, layer.mlp_output_gain)
        if addition is not None:
            add_residual(hidden, addition, self._config.rms_norm_eps)
        return hidden

    def row_alignment(self, counts: Sequence[int]) -> int:
        """At what multiples rows of a width begin in a step that has so many of each."""
        return mixed_alignment(counts, self._layers[0].attention_norm.weight.device, self.is_fast)

    def compile_mixed(self, widths: tuple[int, ...], num_rows: int) -> None:
        """Compile what products of a step of these widths need. From any thread: the GPU is asked for nothing."""
        parts = [Rows(0, num_rows, RowWidths(widths, torch.empty(num_rows, dtype=torch.int64, device="meta")))]
        alike = {(layer.qkv.out_features, layer.gate_up.out_features): layer for layer in self._layers}
        for layer in alike.values():
            products = (layer.qkv, layer.output, layer.gate_up, layer.down)
            if all(product.form(parts[0]) is not None for product in products):
                with only_compiling():
                    self._compile_layer(layer, parts)

    def _compile_layer(self, layer: _Layer, parts: Sequence[Rows]) -> None:
        num_rows = parts[0].stop
        hidden = torch.empty(num_rows, self._config.hidden_size, device="meta")
        addition = Addition(self._empty(num_rows, self._config.hidden_size, hidden.device), layer.mlp_output_gain)
        self._normed(hidden, addition, layer.attention_norm, layer.qkv, parts)
        heads = self._empty(num_rows, self._config.num_heads * self._config.head_dim, hidden.device)
        self._multiplied(heads, None, layer.output, parts)
        gate_up = self._normed(hidden, addition, layer.mlp_norm, layer.gate_up, parts)
        self._multiplied(gate_up, self._config.activation, layer.down, parts)

    def can_read(self, pool: KVPool) -> bool:
        """Whether these layers know the pages' formats: as many as there may be."""
        return len(pool.sealed) <= MOST_FORMATS

    def gains_by_pairs(self) -> bool:
        """Whether pages of ordered pairs are read as quickly as exact ones: wherever they have a kernel."""
        return can_attend_sealed(self._dtype, self._config.head_dim, self._layers[0].attention_norm.weight.device)

    def can_attend(self, pool: KVPool) -> bool:
        """Whether attention over these pages has a kernel: what takes its place can neither be captured nor is it exact."""
        return self.can_read(pool) and all(attention.has_kernels for attention in self._attention_over(pool))

    def _attention_over(self, pool: KVPool) -> list[CudaAttention]:
        layers = self._attention.get(pool)
        if layers is None:
            heads = [layer.heads for layer in self._layers]
            layers = self._attention[pool] = attention_layers(heads, pool, self._dtype)
        return layers

    def _normed(
        self,
        hidden: Tensor,
        addition: Addition | None,
        norm: RMSNorm,
        product: Product,
        parts: Sequence[Rows],
    ) -> Tensor:
        """hidden += addition; the product of its norm: [rows, out]."""
        y = self._empty(hidden.shape[0], product.out_features, hidden.device)
        for rows in parts:
            added = None if addition is None else Addition(addition.values[rows.start : rows.stop], addition.gain)
            residual = hidden[rows.start : rows.stop]
            inputs: Activations | Tensor
            form = product.form(rows)
            if form is None:
                if added is not None:
                    add_residual(residual, added, norm.eps)
                inputs = rms_norm(residual, norm.weight, norm.eps).to(self._dtype)
            else:
                inputs = add_norm_prepare(residual, added, norm.weight, norm.eps, form, self._dtype)
            product(inputs, rows, y)
        return y

    def _multiplied(self, x: Tensor, gate: str | None, product: Product, parts: Sequence[Rows]) -> Tensor:
        """The product of x, gated or as it is: [rows, out]."""
        y = self._empty(x.shape[0], product.out_features, x.device)
        for rows in parts:
            part = x[rows.start : rows.stop]
            form = product.form(rows)
            if form is not None:
                product(prepare_activations(part, form, gate), rows, y)
            elif gate is None:
                product(part, rows, y)
            else:
                gated, up = part.chunk(2, dim=-1)
                product(dispatch.ACTIVATIONS[gate](gated).mul_(up), rows, y)
        return y

    def _attended(
        self, qkv: Tensor, attention: CudaAttention, layer: _Layer, plan: BatchPlan, parts: Sequence[Rows]
    ) -> Tensor:
        """The output projection of attention: [rows, hidden]."""
        splits = attention.splits(qkv, plan)
        if splits is None:
            return self._multiplied(attention(qkv, plan).view(len(qkv), -1), None, layer.output, parts)
        # The merge of splits gives the product's inputs at once.
        y = self._empty(len(qkv), layer.output.out_features, qkv.device)
        for part in parts:
            form = layer.output.form(part)
            if form is None:
                layer.output(splits.merged().view(len(qkv), -1)[part.start : part.stop], part, y)
            else:
                layer.output(splits.prepared(part.start, part.stop, form), part, y)
        return y

    def _empty(self, rows: int, columns: int, device: torch.device) -> Tensor:
        return torch.empty(rows, columns, dtype=self._dtype, device=device)


def cuda_layers(
    config: DecoderConfig, layers: Sequence["DecoderLayer"], dtype: torch.dtype, is_fast: bool
) -> CudaLayers | None:
    """None where a weight has no product here or heads have no kernel."""
    is_fast = is_fast and dtype == torch.bfloat16
    described = [_describe(config, index, layer, dtype, is_fast) for index, layer in enumerate(layers)]
    if any(layer is None for layer in described):
        return None
    if config.head_dim % _HEAD_DIM_MULTIPLE:
        fallbacks.record(
            "cuda_layers", f"there is no kernel for heads of {config.head_dim}, so operations run one by one"
        )
        return None
    return CudaLayers(config, [layer for layer in described if layer is not None], dtype, is_fast)


def _describe(
    config: DecoderConfig, index: int, layer: "DecoderLayer", dtype: torch.dtype, is_fast: bool
) -> _Layer | None:
    attention, mlp = layer.attention, layer.mlp
    linears = (attention.qkv, attention.output, mlp.gate_up, mlp.down)
    qkv, output, gate_up, down = (product_of(linear, dtype, is_fast) for linear in linears)
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    query_norm, key_norm = attention.query_norm, attention.key_norm
    return _Layer(
        attention_norm=layer.attention_norm,
        mlp_norm=layer.mlp_norm,
        attention_output_gain=_gain(layer.attention_output_norm),
        mlp_output_gain=_gain(layer.mlp_output_norm),
        heads=HeadSpec(
            config.head_dim,
            None
            if query_norm is None or key_norm is None
            else HeadNorms(query_norm.weight, key_norm.weight, query_norm.eps),
            attention.rotary,
            attention.settings,
        ),
        qkv=qkv,
        output=output,
        gate_up=gate_up,
        down=down,
    )


def _gain(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight
