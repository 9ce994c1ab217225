"""Paged attention on an NVIDIA GPU, over bfloat16 keys and values."""

import ctypes

import torch
from torch import Tensor

from anybit.kernels.cuda.driver import Argument, can_launch, defined, integers, load_kernel, max_shared_bytes
from anybit.kernels.cuda.fragments import TILE_COLUMNS
from anybit.kernels.cuda.heads import ProjectedHeads
from anybit.kernels.cuda.split_attention import Merge, SplitAttention
from anybit.kernels.cuda.values import VALUES

_PAGE = 64  # keys; as in source/attention.cuh, like the numbers below
_SPLIT_PAGES = 4
_PAGE_WARPS = 2
_ROWS = 16
_WARPS = 4
_BLOCK = 64  # dimensions
_MAX_HEAD_DIM = 256
_MERGE = Merge("merge_splits", "merge_splits", "merge_splits_prepare", TILE_COLUMNS, sequences=4, threads=128)


class _Problem(ctypes.Structure):
    """`Problem` of source/attention.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "tables", "positions")),
        *((name, ctypes.c_void_p) for name in ("out", "partial", "partial_norm")),
        *((name, ctypes.c_int) for name in ("tokens", "heads", "kv_heads", "table_pages", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


def can_attend(dtype: torch.dtype, k_pages: Tensor) -> bool:
    """Whether the kernels know queries of this type and pages like these, and can be built here."""
    _, _, page_size, head_dim = k_pages.shape
    return (
        dtype in VALUES
        and k_pages.dtype == torch.bfloat16
        and page_size == _PAGE
        and head_dim % _BLOCK == 0
        and head_dim <= _MAX_HEAD_DIM
        and can_launch(k_pages.device)
        and _rows_shared_bytes(head_dim) <= max_shared_bytes(k_pages.device)
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
    """As `portable.attention.paged_attention`, for what `can_attend` admits."""
    sequences, tokens, heads, head_dim = q.shape
    q, block_tables, positions = q.contiguous(), block_tables.contiguous(), positions.contiguous()
    if tokens == 1:
        return attend_splits(q, k_pages, v_pages, block_tables, positions, scale, window, softcap).merged()
    out = torch.empty_like(q)
    problem = _problem((q, k_pages, v_pages, block_tables, positions), scale, window, softcap)
    problem.out = out.data_ptr()
    row_tiles = -(-tokens * (heads // k_pages.shape[1]) // _ROWS)
    shared_bytes = _rows_shared_bytes(head_dim)
    constants = _constants(q, window, softcap)
    kernel = load_kernel("attend_rows", "attend_rows", defined(**constants), shared_bytes)
    grid = (-(-row_tiles // _WARPS), k_pages.shape[1], sequences)
    kernel.launch(grid, 32 * _WARPS, [problem], shared_bytes)
    return out


def attend_splits(
    queries: Tensor | ProjectedHeads,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> SplitAttention:
    """`paged_attention` of one token a sequence, up to the merge; all tensors contiguous.

    Queries that come as projected bring the newest keys and values, which go to their pages, and are of these rows.
    Waits for nothing and allocates by the width of the tables alone: it can be captured, and replayed for any positions
    that the tables have room for.
    """
    q = queries if isinstance(queries, Tensor) else queries.queries
    sequences, _, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    splits = -(-block_tables.shape[1] // _SPLIT_PAGES)
    sums = torch.empty(sequences, heads, splits, head_dim, device=q.device)
    norms = torch.empty(sequences, heads, splits, 2, device=q.device)
    problem = _problem((q, k_pages, v_pages, block_tables, positions), scale, window, softcap)
    problem.partial, problem.partial_norm = sums.data_ptr(), norms.data_ptr()
    # Pages are copied to shared memory, all of them at once, where it has room for them.
    staged_bytes = _SPLIT_PAGES * 2 * _PAGE * head_dim * k_pages.element_size()
    staged = staged_bytes + _static_shared_bytes(q) <= max_shared_bytes(q.device)
    shared_bytes = staged_bytes if staged else _SPLIT_PAGES * _ROWS * head_dim * 4
    constants = _constants(q, window, softcap)
    attending = {**constants, "STAGED": int(staged)}
    arguments: list[Argument] = [problem, *integers(splits)]
    if isinstance(queries, ProjectedHeads):
        attending |= {**queries.constants, "FROM_PROJECTION": 1}
        arguments.append(queries.described())
    row_tiles = -(-(heads // kv_heads) // _ROWS)
    kernel = load_kernel("attend_splits", "attend_splits", defined(**attending), shared_bytes)
    grid = (splits, kv_heads * row_tiles, sequences)
    kernel.launch(grid, 32 * _SPLIT_PAGES * _PAGE_WARPS, arguments, shared_bytes)
    return SplitAttention(q, problem, constants, splits, _MERGE, (positions, sums, norms))


def _static_shared_bytes(q: Tensor) -> int:
    """Of a block of `attend_splits`: a tile of queries, the newest key and value in bfloat16, norms of rows."""
    head_dim = q.shape[-1]
    return _ROWS * head_dim * q.element_size() + 2 * 2 * head_dim + _SPLIT_PAGES * _ROWS * 8


def _rows_shared_bytes(head_dim: int) -> int:
    return 2 * _WARPS * _ROWS * head_dim * 4


def _problem(tensors: tuple[Tensor, ...], scale: float, window: int | None, softcap: float | None) -> _Problem:
    """`tensors` are queries, pages of keys and of values, block tables and positions."""
    q, k_pages, _, block_tables, _ = tensors
    return _Problem(
        *(tensor.data_ptr() for tensor in tensors),
        tokens=q.shape[1],
        heads=q.shape[2],
        kv_heads=k_pages.shape[1],
        table_pages=block_tables.shape[1],
        window=window or 0,
        scale=scale,
        softcap=softcap or 0.0,
    )


def _constants(q: Tensor, window: int | None, softcap: float | None) -> dict[str, int]:
    return {
        "HEAD_DIM": q.shape[-1],
        "VALUE": VALUES[q.dtype],
        "HAS_WINDOW": int(window is not None),
        "HAS_SOFTCAP": int(softcap is not None),
    }
