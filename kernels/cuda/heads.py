"""Heads between the projection of queries, keys and values and attention, on an NVIDIA GPU."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels.cuda.driver import defined, load_kernel, pointers
from anybit.kernels.cuda.values import VALUES

_WARPS = 4
MOST_FORMATS = 32


class _Projected(ctypes.Structure):
    """`Projected` of source/heads.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "keys", "values", "cosines", "sines")),
        *((name, ctypes.c_void_p) for name in ("query_gain", "key_gain", "positions", "page_ids", "page_offsets")),
        *((name, ctypes.c_void_p) for name in ("row_formats", "key_weights", "signs")),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_uint32) for name in ("rotated_keys", "rotated_values")),
    ]


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Gains float32 [head_dim] of norms over each query's and each key's dimensions."""

    query_gain: Tensor
    key_gain: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Where rows stand: positions, and the pages their keys and values go to; all int64 [rows].

    `row_formats` int64 [rows] are numbers of sealed formats, -1 for exact ones; None if all are exact.
    """

    positions: Tensor
    page_ids: Tensor
    page_offsets: Tensor
    row_formats: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerBases:
    """One layer's bases of sealed formats (`kvcache.codec.balance.PageBasis`), by their numbers, at most MOST_FORMATS.

    `signs` float32 [head_dim] of the rotation, which `rotates_keys` and `rotates_values` say is made; keys are multiplied by
    `key_weights` float32 [kv_heads, head_dim] before and queries divided by them.
    """

    signs: Tensor
    key_weights: Tensor | None
    rotates_keys: tuple[bool, ...]
    rotates_values: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class ProjectedHeads:
    """Heads as the projection leaves them, and what it takes to attend with them.

    Rows of sealed formats are taken into the basis of their pages. qkv [rows, heads + 2·kv_heads, head_dim], contiguous;
    cosines and sines float32 [positions, head_dim / 2]; pages [pages, kv_heads, page size 64, head_dim].
    """

    qkv: Tensor
    places: RowPlaces
    cosines: Tensor
    sines: Tensor
    k_pages: Tensor
    v_pages: Tensor
    norms: HeadNorms | None = None
    bases: LayerBases | None = None

    @property
    def queries(self) -> Tensor:
        """Those of one token a sequence as they are: [rows, 1, heads, head_dim]."""
        return self.qkv[:, None, : self.qkv.shape[1] - 2 * self.k_pages.shape[1]]

    @property
    def constants(self) -> dict[str, int]:
        """What kernels that take heads like these are compiled for."""
        return {
            "HEAD_DIM": self.qkv.shape[2],
            "VALUE": VALUES[self.qkv.dtype],
            "PAGE_VALUE": VALUES[self.k_pages.dtype],
            "HAS_NORM": int(self.norms is not None),
            "HAS_BASES": int(self.bases is not None and self.places.row_formats is not None),
        }

    def described(self) -> ctypes.Structure:
        """As kernels take them."""
        norms, places, kv_heads = self.norms, self.places, self.k_pages.shape[1]
        projected = _Projected(
            *(tensor.data_ptr() for tensor in (self.qkv, self.k_pages, self.v_pages, self.cosines, self.sines)),
            None if norms is None else norms.query_gain.data_ptr(),
            None if norms is None else norms.key_gain.data_ptr(),
            *(tensor.data_ptr() for tensor in (places.positions, places.page_ids, places.page_offsets)),
            heads=self.qkv.shape[1] - 2 * kv_heads,
            kv_heads=kv_heads,
            eps=0.0 if norms is None else norms.eps,
        )
        if self.bases is not None and places.row_formats is not None:
            bases = self.bases
            projected.row_formats, projected.signs = places.row_formats.data_ptr(), bases.signs.data_ptr()
            projected.key_weights = None if bases.key_weights is None else bases.key_weights.data_ptr()
            projected.rotated_keys, projected.rotated_values = _bits(bases.rotates_keys), _bits(bases.rotates_values)
        return projected


def rotate_and_store(projected: ProjectedHeads) -> Tensor:
    """Write rotated keys and values to their pages; the rotated queries [rows, heads, head_dim]."""
    rows, all_heads, _ = projected.qkv.shape
    q = torch.empty_like(projected.queries[:, 0], memory_format=torch.contiguous_format)
    kernel = load_kernel("rotate", "rotate_and_store", defined(**projected.constants))
    kernel.launch((-(-all_heads // _WARPS), rows, 1), 32 * _WARPS, [projected.described(), *pointers(q)])
    return q


def _bits(flags: tuple[bool, ...]) -> int:
    if len(flags) > MOST_FORMATS:
        raise ValueError(f"Rows are of at most {MOST_FORMATS} sealed formats, not {len(flags)}.")
    return sum(flag << number for number, flag in enumerate(flags))
