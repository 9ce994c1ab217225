"""A nested weight in vector order, and the native operations on it.

Activations enter as fixed point numbers with one step per (token, group): x ≈ step·(128·d1 + d0) with int8 digits, an error
below 1/32638 of the group's largest magnitude. Products with codes are summed as integers; the float operations that
follow have a fixed order. A row's result therefore depends on that row and its width alone, whatever the batch, the
threads or the instruction set.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels import layout
from anybit.kernels.cpu.bindings import FloatPart, Segment, Weight, is_native, native_library
from anybit.kernels.nested import NestedWeight

BLOCK_ROWS = 16
ACTIVATION_ERROR = 1 / 32638
"""Largest error of an activation as a share of its group's largest magnitude."""
_LANES = 64
_SPAN_INPUTS = 32


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """What a NestedWeight holds, in the order that native/nested.h describes; `tensors` keep the memory alive."""

    out_features: int
    in_features: int
    group_size: int
    bit_widths: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    descriptor: Weight

    @property
    def nbytes(self) -> int:
        """Bytes resident in memory."""
        return sum(tensor.nbytes for tensor in self.tensors)


def can_pack(weight: NestedWeight) -> bool:
    """Whether the native kernels are there and know this weight's place and number types."""
    part = next(iter(weight.affine.values()))
    return part.scale.device.type == "cpu" and part.scale.dtype in (torch.float16, torch.float32) and is_native()


def pack(weight: NestedWeight) -> PackedWeight:
    """Copy a weight into vector order. The canonical copy is of no further use and may be freed."""
    native = _library()
    blocks = -(-weight.out_features // BLOCK_ROWS)
    stored_rows = layout.padded_rows(weight.out_features)
    descriptor = Weight(weight.out_features, weight.in_features, weight.group_size)
    tensors = []
    for index, chunk in enumerate(layout.CHUNKS):
        if chunk.name in weight.chunks:
            size = blocks * (weight.in_features // _SPAN_INPUTS) * chunk.bits * _LANES
            packed = torch.empty(size, dtype=torch.uint8)
            canonical = weight.chunks[chunk.name].contiguous()
            native.anybit_pack_chunk(
                canonical.data_ptr(), stored_rows, weight.in_features, index, blocks, packed.data_ptr()
            )
            descriptor.chunks[index] = packed.data_ptr()
            tensors.append(packed)

    def pack_part(part: Tensor) -> int:
        packed = torch.empty(blocks * weight.num_groups * BLOCK_ROWS, dtype=part.dtype)
        canonical = part.contiguous()
        native.anybit_pack_part(
            canonical.data_ptr(), stored_rows, weight.num_groups, part.itemsize, blocks, packed.data_ptr()
        )
        tensors.append(packed)
        return packed.data_ptr()

    for index, width in enumerate(layout.BIT_WIDTHS):
        if width in weight.affine:
            part = weight.affine[width]
            descriptor.float_bytes = part.scale.itemsize
            descriptor.parts[index] = FloatPart(pack_part(part.scale), pack_part(part.zero))
    return PackedWeight(
        weight.out_features, weight.in_features, weight.group_size, weight.bit_widths, tuple(tensors), descriptor
    )


def linear(
    x: Tensor, weight: PackedWeight, segments: Sequence[tuple[int, int, int]], bias: Tensor | None = None
) -> Tensor:
    """x Ŵᵀ (+ bias), each segment (bit_width, start, stop) of rows at its width: float32 [tokens, in] -> [tokens, out]."""
    absent = [width for width, _, _ in segments if width not in weight.bit_widths]
    if absent:
        raise ValueError(f"The weight was not loaded at {absent[0]} bits.")
    x = x.to(torch.float32).contiguous()
    out = torch.empty(x.shape[0], weight.out_features)
    _library().anybit_linear(
        ctypes.byref(weight.descriptor),
        x.data_ptr(),
        x.shape[0],
        (Segment * len(segments))(*(Segment(*segment) for segment in segments)),
        len(segments),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def embedding(token_ids: Tensor, weight: PackedWeight, bit_width: int) -> Tensor:
    """Rows of a packed table: int64 [tokens] -> float32 [tokens, in]."""
    ids = token_ids.contiguous()
    out = torch.empty(ids.numel(), weight.in_features)
    _library().anybit_embedding(ctypes.byref(weight.descriptor), bit_width, ids.data_ptr(), ids.numel(), out.data_ptr())
    return out


def can_normalise(x: Tensor) -> bool:
    """Whether the native kernels are there and x has their number type and whole vectors."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[-1] % BLOCK_ROWS == 0 and is_native()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, float32 (arXiv 1910.07467, eq. 4)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    _library().anybit_rms_norm(x.data_ptr(), weight.data_ptr(), x.numel() // size, size, eps, out.data_ptr())
    return out


def greedy(logits: Tensor) -> Tensor:
    """Per row the index of the largest logit, or −1 where one is not finite: float32 [rows, vocab] -> int64 [rows]."""
    logits = logits.contiguous()
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    _library().anybit_greedy(logits.data_ptr(), *logits.shape, out.data_ptr())
    return out


def _library() -> ctypes.CDLL:
    native = native_library()
    if native is None:
        raise RuntimeError("The native CPU kernels were not built.")
    return native
