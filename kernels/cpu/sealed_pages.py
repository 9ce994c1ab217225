"""Sealed pages of a layer as the native step reads them."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels.page_layout import pair_layout

_LARGEST_LEVEL = 127


@dataclass(frozen=True, slots=True)
class PairRecords:
    """Records uint8 [pages, kv_heads, bytes] of ordered pairs, and what their codes stand for, float32 [2^bits, 2].

    Pages are sealed by `entries` float32 [2^(bits−1), 2]: the nearest of `clusters` [clusters, 2] is chosen first, then the
    nearest of its entries, which lie side by side.
    """

    records: Tensor
    levels: Tensor
    entries: Tensor
    clusters: Tensor
    has_mean: bool

    @property
    def code_bits(self) -> int:
        return (len(self.levels) - 1).bit_length()


@dataclass(frozen=True, slots=True)
class StackSealedPages:
    """One layer's pages of a sealed format, with `exact_tokens` of a sequence as they were.

    Vectors are rotated with `signs` [head_dim], keys before that multiplied by `weights` [kv_heads, head_dim] (None: not).
    """

    keys: PairRecords
    values: PairRecords
    exact_tokens: int
    weights: Tensor | None
    signs: Tensor


class _PairCode(ctypes.Structure):
    _fields_ = [
        ("levels", ctypes.c_void_p),
        ("step", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("bits", "norms", "norm_range", "mean", "mean_range")),
        ("entries", ctypes.c_void_p),
        ("clusters", ctypes.c_void_p),
        ("num_clusters", ctypes.c_int64),
    ]


class _SealedPages(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_bytes", ctypes.c_int64),
        ("value_bytes", ctypes.c_int64),
        ("key_code", _PairCode),
        ("value_code", _PairCode),
        ("exact_tokens", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("signs", ctypes.c_void_p),
    ]


class DescribedSealedPages:
    """Addresses of a layer's sealed pages, by format; keeps their memory alive."""

    def __init__(self, formats: Sequence[StackSealedPages]) -> None:
        self._alive: list[Tensor] = []
        self._array = (_SealedPages * max(1, len(formats)))(*map(self._describe, formats))

    @property
    def address(self) -> int:
        return ctypes.addressof(self._array)

    def _describe(self, pages: StackSealedPages) -> _SealedPages:
        head_dim = len(pages.signs)
        return _SealedPages(
            self._kept(pages.keys.records),
            self._kept(pages.values.records),
            pages.keys.records.shape[-1],
            pages.values.records.shape[-1],
            self._code(pages.keys, head_dim),
            self._code(pages.values, head_dim),
            pages.exact_tokens,
            None if pages.weights is None else self._kept(pages.weights.to(torch.float32).contiguous()),
            self._kept(pages.signs.to(torch.float32).contiguous()),
        )

    def _code(self, part: PairRecords, head_dim: int) -> _PairCode:
        offsets = pair_layout(part.code_bits, part.has_mean, head_dim).offsets
        levels, step = _in_steps(part.levels)
        fields = (offsets["norms"], offsets["norm_range"], offsets.get("mean", -1), offsets.get("mean_range", -1))
        entries, clusters = (points.to(torch.float32).contiguous() for points in (part.entries, part.clusters))
        return _PairCode(
            self._kept(levels),
            step,
            part.code_bits,
            *fields,
            self._kept(entries),
            self._kept(clusters),
            len(clusters),
        )

    def _kept(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        return tensor.data_ptr()


def _in_steps(levels: Tensor) -> tuple[Tensor, float]:
    """Levels as bytes, each larger by 128, all codes' first ones and then all second ones; and their step.

    ValueError if they are not whole numbers of one step, or the upper half of codes is not the lower one exchanged.
    """
    step = float(levels.abs().max()) / _LARGEST_LEVEL
    steps = (levels / step).round()
    lower, upper = levels.chunk(2)
    if not torch.allclose(steps * step, levels) or not torch.equal(lower.flip(1), upper):
        raise ValueError("The native step reads tables of whole steps whose upper half is the lower one exchanged.")
    return (steps + 128).to(torch.uint8).T.contiguous(), step
