"""Paged attention on an NVIDIA GPU, over bfloat16 keys and values."""

import ctypes

import torch
from torch import Tensor

from anybit.kernels.cuda.driver import Argument, can_launch, defined, load_kernel
from anybit.kernels.cuda.values import VALUES

_SPLIT = 128  # keys; as in source/attention.cu, like the numbers below
_PAGE = 64
_ROWS = 16
_WARPS = 4
_BLOCK = 64  # dimensions
_MAX_HEAD_DIM = 256


class _Problem(ctypes.Structure):
    """`Problem` of source/attention.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "tables", "positions", "out", "partial", "norm")),
        *((name, ctypes.c_int) for name in ("tokens", "heads", "kv_heads", "table_pages", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


def can_attend(q: Tensor, k_pages: Tensor) -> bool:
    """Whether the kernels know these number types and sizes, and can be built here."""
    _, _, page_size, head_dim = k_pages.shape
    return (
        q.dtype in VALUES
        and k_pages.dtype == torch.bfloat16
        and page_size == _PAGE
        and head_dim % _BLOCK == 0
        and head_dim <= _MAX_HEAD_DIM
        and can_launch(q.device)
    )


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `portable.attention.paged_attention`, for what `can_attend` admits.

    Allocates and waits for nothing but its result and, for one token a sequence, the partial results of table_pages / 2
    splits: it can be captured, and replayed for any positions that the tables have room for.
    """
    sequences, tokens, heads, head_dim = q.shape
    kv_heads, table_pages = k_pages.shape[1], block_tables.shape[1]
    q, block_tables, positions = q.contiguous(), block_tables.contiguous(), positions.contiguous()
    out = torch.empty_like(q)
    splits = -(-table_pages * _PAGE // _SPLIT)
    partial = torch.empty(sequences, heads, splits, head_dim + 2, device=q.device) if tokens == 1 else None
    flags = {"HAS_WINDOW": int(window is not None), "HAS_SOFTCAP": int(softcap is not None)}
    constants = defined(HEAD_DIM=head_dim, VALUE=VALUES[q.dtype], **flags)
    sums, norms = _halves(partial, head_dim)
    problem = _Problem(
        *(tensor.data_ptr() for tensor in (q, k_pages, v_pages, block_tables, positions, out)),
        *(sums, norms),
        *(tokens, heads, kv_heads, table_pages, window or 0),
        *(scale, softcap or 0.0),
    )
    row_tiles = -(-tokens * (heads // kv_heads) // _ROWS)
    if partial is None:
        shared_bytes = _WARPS * _ROWS * head_dim * 4
        kernel = load_kernel("attention", "attend_rows", constants, shared_bytes)
        kernel.launch((-(-row_tiles // _WARPS), kv_heads, sequences), 32 * _WARPS, [problem], shared_bytes)
        return out
    arguments: list[Argument] = [problem, ctypes.c_int(splits)]
    load_kernel("attention", "attend_splits", constants).launch(
        (-(-splits // _WARPS), kv_heads * row_tiles, sequences), 32 * _WARPS, arguments
    )
    load_kernel("attention", "merge_splits", constants).launch((heads, sequences, 1), head_dim, arguments)
    return out


def _halves(partial: Tensor | None, head_dim: int) -> tuple[int, int]:
    """Addresses of the partial sums and of the two numbers of each that follow all of them."""
    if partial is None:
        return 0, 0
    rows = partial.numel() // (head_dim + 2)
    return partial.data_ptr(), partial.data_ptr() + 4 * rows * head_dim
