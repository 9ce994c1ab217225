"""The decoder's layers on an NVIDIA GPU, with what lies between two products in one launch each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anybit.engine.batch import BatchPlan
from anybit.engine.layers.linear import Linear, NestedLinear
from anybit.engine.layers.norm import RMSNorm
from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.models.config import DecoderConfig
from anybit.kernels import dispatch, fallbacks
from anybit.kernels.cuda.activations import (
    Activations,
    Addition,
    add_norm_quantize,
    add_residual,
    quantize_activations,
    rms_norm,
)
from anybit.kernels.cuda.attention import attend_splits, can_attend
from anybit.kernels.cuda.fragments import FragmentWeight
from anybit.kernels.cuda.linear import choose_pass_tiles, dequantize, multiply, multiply_mixed
from anybit.kernels.cuda.rotary import HeadNorms, RowPlaces, rotate_and_store
from anybit.kernels.widths import TileWidths
from anybit.kvcache.pool import KVPool

if TYPE_CHECKING:
    from anybit.engine.models.decoder import DecoderLayer

_HEAD_DIM_MULTIPLE = 64
_MANY_ROWS = 128  # from here on a weight is better unpacked once


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows start .. stop−1 of a step, which one launch computes."""

    start: int
    stop: int
    widths: int | TileWidths

    def pass_tiles(self, weight: FragmentWeight) -> int:
        """The order in which a product with `weight` wants these rows."""
        return 1 if isinstance(self.widths, TileWidths) else choose_pass_tiles(self.stop - self.start, weight)


@dataclass(frozen=True, slots=True)
class _Product:
    weight: FragmentWeight
    bias: Tensor | None

    def __call__(self, inputs: Activations | Tensor, rows: _Rows, y: Tensor) -> None:
        """Write the product of `inputs`, which are these rows, to theirs of y [all rows, out].

        Inputs as bfloat16 are multiplied by the library, with the weight as bfloat16 at the rows' one width.
        """
        part = y[rows.start : rows.stop]
        if isinstance(inputs, Tensor):
            if isinstance(rows.widths, TileWidths):
                raise ValueError("Rows of several widths have no common weight.")
            torch.mm(inputs, dequantize(self.weight, rows.widths).T, out=part)
            if self.bias is not None:
                part += self.bias
        elif isinstance(rows.widths, TileWidths):
            multiply_mixed(inputs, self.weight, rows.widths, self.bias, part)
        else:
            multiply(inputs, self.weight, rows.widths, self.bias, part)


def _parts(plan: BatchPlan) -> list[_Rows]:
    if plan.tile_widths is not None:
        return [_Rows(0, len(plan.token_ids), plan.tile_widths)]
    return [_Rows(start, stop, width) for width, start, stop in plan.segments]


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: RMSNorm
    mlp_norm: RMSNorm
    attention_output_gain: Tensor | None
    mlp_output_gain: Tensor | None
    head_norms: HeadNorms | None
    rotary: RotaryEmbedding
    qkv: _Product
    output: _Product
    gate_up: _Product
    down: _Product
    window: int | None


class CudaLayers:
    """Runs all layers; the residual stream stays float32, what passes between kernels has the decoder's dtype.

    Without `is_fast` a row's result depends on that row alone. With it, many rows of one width, such as prompts, are
    multiplied in bfloat16 by the library, whose order of sums depends on their number.
    """

    def __init__(self, config: DecoderConfig, layers: Sequence[_Layer], dtype: torch.dtype, is_fast: bool) -> None:
        self._config = config
        self._layers = layers
        self._dtype = dtype
        self.is_fast = is_fast

    def __call__(self, hidden: Tensor, plan: BatchPlan, pool: KVPool) -> Tensor:
        """float32 [rows, hidden] -> the same tensor, after all layers."""
        addition: Addition | None = None
        parts = _parts(plan)
        places = RowPlaces(plan.positions, plan.page_ids, plan.page_offsets)
        for index, layer in enumerate(self._layers):
            qkv = self._normed(hidden, addition, layer.attention_norm, layer.qkv, parts)
            keys, values = pool.keys(index), pool.values(index)
            q = rotate_and_store(
                qkv.view(len(hidden), -1, self._config.head_dim),
                places,
                layer.rotary.cosines,
                layer.rotary.sines,
                keys,
                values,
                layer.head_norms,
            )
            output = self._attended(q, keys, values, layer, plan, parts)
            addition = Addition(output, layer.attention_output_gain)
            gate_up = self._normed(hidden, addition, layer.mlp_norm, layer.gate_up, parts)
            down = self._quantized(gate_up, self._config.activation, layer.down, parts)
            addition = Addition(down, layer.mlp_output_gain)
        if addition is not None:
            add_residual(hidden, addition, self._config.rms_norm_eps)
        return hidden

    def can_attend(self, pool: KVPool) -> bool:
        """Whether attention over these pages has a kernel: what takes its place can neither be captured nor is it exact."""
        return can_attend(self._dtype, pool.keys(0))

    def _normed(
        self,
        hidden: Tensor,
        addition: Addition | None,
        norm: RMSNorm,
        product: _Product,
        parts: Sequence[_Rows],
    ) -> Tensor:
        """hidden += addition; the product of its norm: [rows, out]."""
        y = self._empty(hidden.shape[0], product.weight.out_features, hidden.device)
        for rows in parts:
            added = None if addition is None else Addition(addition.values[rows.start : rows.stop], addition.gain)
            residual = hidden[rows.start : rows.stop]
            inputs: Activations | Tensor
            if self._is_for_library(rows):
                if added is not None:
                    add_residual(residual, added, norm.eps)
                inputs = rms_norm(residual, norm.weight, norm.eps).to(self._dtype)
            else:
                group_size = product.weight.group_size
                inputs = add_norm_quantize(
                    residual, added, norm.weight, norm.eps, group_size, self._dtype, rows.pass_tiles(product.weight)
                )
            product(inputs, rows, y)
        return y

    def _is_for_library(self, rows: _Rows) -> bool:
        many = rows.stop - rows.start >= _MANY_ROWS and isinstance(rows.widths, int)
        return self.is_fast and many and self._dtype == torch.bfloat16

    def _quantized(self, x: Tensor, gate: str | None, product: _Product, parts: Sequence[_Rows]) -> Tensor:
        """The product of x, gated or as it is: [rows, out]."""
        y = self._empty(x.shape[0], product.weight.out_features, x.device)
        for rows in parts:
            part = x[rows.start : rows.stop]
            if not self._is_for_library(rows):
                pass_tiles = rows.pass_tiles(product.weight)
                product(quantize_activations(part, product.weight.group_size, gate, pass_tiles), rows, y)
            elif gate is None:
                product(part, rows, y)
            else:
                gated, up = part.chunk(2, dim=-1)
                product(dispatch.ACTIVATIONS[gate](gated).mul_(up), rows, y)
        return y

    def _attended(
        self, q: Tensor, keys: Tensor, values: Tensor, layer: _Layer, plan: BatchPlan, parts: Sequence[_Rows]
    ) -> Tensor:
        """The output projection of attention: [rows, hidden]."""
        rows = len(q)
        settings = (self._config.attention_scale, layer.window, self._config.attention_softcap)
        group = plan.attention_groups[0]
        if group.row_ids.shape == (rows, 1) and can_attend(q.dtype, keys):
            # One token of each sequence, in the order of the rows: the merge of splits gives fixed point numbers at once.
            splits = attend_splits(q[:, None], keys, values, group.block_tables, group.positions, *settings)
            y = self._empty(rows, layer.output.weight.out_features, q.device)
            weight = layer.output.weight
            for part in parts:
                inputs = splits.quantized(part.start, part.stop, weight.group_size, part.pass_tiles(weight))
                layer.output(inputs, part, y)
            return y
        attended = torch.empty_like(q)
        for group in plan.attention_groups:
            attended[group.row_ids] = dispatch.paged_attention(
                q[group.row_ids], keys, values, group.block_tables, group.positions, *settings
            )
        return self._quantized(attended.view(rows, -1), None, layer.output, parts)

    def _empty(self, rows: int, columns: int, device: torch.device) -> Tensor:
        return torch.empty(rows, columns, dtype=self._dtype, device=device)


def cuda_layers(
    config: DecoderConfig, layers: Sequence["DecoderLayer"], dtype: torch.dtype, is_fast: bool
) -> CudaLayers | None:
    """None where a weight is not in fragment order or heads have no kernel."""
    described = [_describe(config, index, layer) for index, layer in enumerate(layers)]
    if any(layer is None for layer in described):
        return None
    if config.head_dim % _HEAD_DIM_MULTIPLE:
        fallbacks.record(
            "cuda_layers", f"there is no kernel for heads of {config.head_dim}, so operations run one by one"
        )
        return None
    return CudaLayers(config, [layer for layer in described if layer is not None], dtype, is_fast)


def _describe(config: DecoderConfig, index: int, layer: "DecoderLayer") -> _Layer | None:
    attention, mlp = layer.attention, layer.mlp
    qkv, output, gate_up, down = map(_product, (attention.qkv, attention.output, mlp.gate_up, mlp.down))
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    query_norm, key_norm = attention.query_norm, attention.key_norm
    return _Layer(
        attention_norm=layer.attention_norm,
        mlp_norm=layer.mlp_norm,
        attention_output_gain=_gain(layer.attention_output_norm),
        mlp_output_gain=_gain(layer.mlp_output_norm),
        head_norms=None
        if query_norm is None or key_norm is None
        else HeadNorms(query_norm.weight, key_norm.weight, query_norm.eps),
        rotary=attention.rotary,
        qkv=qkv,
        output=output,
        gate_up=gate_up,
        down=down,
        window=config.layers[index].sliding_window,
    )


def _gain(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight


def _product(linear: Linear) -> _Product | None:
    if isinstance(linear, NestedLinear) and isinstance(linear.weight, FragmentWeight):
        return _Product(linear.weight, linear.bias)
    return None
