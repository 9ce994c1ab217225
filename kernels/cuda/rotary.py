"""Between the projection of queries, keys and values and attention, on an NVIDIA GPU."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels.cuda.driver import defined, load_kernel
from anybit.kernels.cuda.values import VALUES

_WARPS = 4


class _Step(ctypes.Structure):
    """`Step` of source/rotate.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "q", "keys", "values", "cosines", "sines")),
        *((name, ctypes.c_void_p) for name in ("query_gain", "key_gain", "positions", "page_ids", "page_offsets")),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads")),
        ("eps", ctypes.c_float),
    ]


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Gains float32 [head_dim] of norms over each query's and each key's dimensions."""

    query_gain: Tensor
    key_gain: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Where rows stand: positions, and the pages their keys and values go to; all int64 [rows]."""

    positions: Tensor
    page_ids: Tensor
    page_offsets: Tensor


def rotate_and_store(
    qkv: Tensor,
    places: RowPlaces,
    cosines: Tensor,
    sines: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Write rotated keys and values to their pages; the rotated queries [rows, heads, head_dim].

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
        *(heads, kv_heads),
        0.0 if norms is None else norms.eps,
    )
    kernel = load_kernel(
        "rotate",
        "rotate_and_store",
        defined(
            HEAD_DIM=head_dim,
            VALUE=VALUES[qkv.dtype],
            PAGE_VALUE=VALUES[k_pages.dtype],
            HAS_NORM=int(norms is not None),
        ),
    )
    kernel.launch((-(-all_heads // _WARPS), rows, 1), 32 * _WARPS, [step])
    return q
