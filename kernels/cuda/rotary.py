"""Between the projection of queries, keys and values and attention, on an NVIDIA GPU."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels.cuda.driver import defined, load_kernel
from anybit.kernels.cuda.values import VALUES

_WARPS = 4
MOST_FORMATS = 32


class _Step(ctypes.Structure):
    """`Step` of source/rotate.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "q", "keys", "values", "cosines", "sines")),
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


def rotate_and_store(
    qkv: Tensor,
    places: RowPlaces,
    cosines: Tensor,
    sines: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    norms: HeadNorms | None = None,
    bases: LayerBases | None = None,
) -> Tensor:
    """Write rotated keys and values to their pages; the rotated queries [rows, heads, head_dim].

    Rows of sealed formats are taken into the basis of their pages.

    qkv [rows, heads + 2·kv_heads, head_dim], contiguous; cosines and sines float32 [positions, head_dim / 2];
    pages [pages, kv_heads, page size 64, head_dim].
    """
    rows, all_heads, head_dim = qkv.shape
    kv_heads = k_pages.shape[1]
    heads = all_heads - 2 * kv_heads
    q = torch.empty(rows, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    step = _Step(
        *(tensor.data_ptr() for tensor in (qkv, q, k_pages, v_pages, cosines, sines)),
        None if norms is None else norms.query_gain.data_ptr(),
        None if norms is None else norms.key_gain.data_ptr(),
        *(tensor.data_ptr() for tensor in (places.positions, places.page_ids, places.page_offsets)),
        heads=heads,
        kv_heads=kv_heads,
        eps=0.0 if norms is None else norms.eps,
    )
    if bases is not None and places.row_formats is not None:
        step.row_formats, step.signs = places.row_formats.data_ptr(), bases.signs.data_ptr()
        step.key_weights = None if bases.key_weights is None else bases.key_weights.data_ptr()
        step.rotated_keys, step.rotated_values = _bits(bases.rotates_keys), _bits(bases.rotates_values)
    kernel = load_kernel(
        "rotate",
        "rotate_and_store",
        defined(
            HEAD_DIM=head_dim,
            VALUE=VALUES[qkv.dtype],
            PAGE_VALUE=VALUES[k_pages.dtype],
            HAS_NORM=int(norms is not None),
            HAS_BASES=int(step.row_formats is not None),
        ),
    )
    kernel.launch((-(-all_heads // _WARPS), rows, 1), 32 * _WARPS, [step])
    return q


def _bits(flags: tuple[bool, ...]) -> int:
    if len(flags) > MOST_FORMATS:
        raise ValueError(f"Rows are of at most {MOST_FORMATS} sealed formats, not {len(flags)}.")
    return sum(flag << number for number, flag in enumerate(flags))
