"""Attention of new tokens over sealed pages on an NVIDIA GPU, without decoding them."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels.attention_inputs import AttentionSettings, ExactPages
from anybit.kernels.cuda.driver import (
    Argument,
    can_launch,
    defined,
    integers,
    load_kernel,
    max_shared_bytes,
    num_multiprocessors,
)
from anybit.kernels.cuda.fragments import TILE_COLUMNS
from anybit.kernels.cuda.heads import ProjectedHeads, rotate_and_store
from anybit.kernels.cuda.split_attention import Merge, SplitAttention
from anybit.kernels.cuda.values import VALUES
from anybit.kernels.page_layout import PAGE_TOKENS, PageLayout, pair_layout, uniform_layout

_HEAD_DIMS = (64, 128, 256)
_COLUMNS = 8  # of a product; as in source/sealed_problem.cuh, like the numbers below
_NARROW = 4  # query heads of a KV head for which half of them are enough
_SPLIT_PAGES = 8
_TABLE_ROWS = {4: 256, 6: 64, 8: 256, 16: 0}  # by the bits of a code, as in source/sealed.cuh
_ROW_WARPS = (16, 8, 4, 2)  # the most that a block has room for
_TOGETHER = (8, 16, 32)  # splits that are read at once when they are merged
_FEW_SPLITS = 2  # of a multiprocessor: up to as many, a warp takes a page; beyond, a split
_STREAM_SLOTS = 2  # records of each warp that takes splits, one under way while the other is read
_STATIC_SHARED_BYTES = 2048  # of a kernel, at most, with what the system takes


@dataclass(frozen=True, slots=True)
class PairRecords:
    """Records of keys or of values, uint8 [pages, kv_heads, bytes], and what their codes stand for, float16 [2^bits, 2]."""

    records: Tensor
    levels: Tensor

    @property
    def code_bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    def layout(self, is_keys: bool, head_dim: int) -> PageLayout:
        return pair_layout(self.code_bits, has_mean=is_keys, head_dim=head_dim)


@dataclass(frozen=True, slots=True)
class UniformRecords:
    """Records uint8 [pages, kv_heads, bytes] with evenly spaced levels of 8 bits, per channel (keys) or token (values)."""

    records: Tensor

    @property
    def levels(self) -> None:
        """Codes stand for themselves."""
        return None

    @property
    def code_bits(self) -> int:
        """Of two neighbours, as with pairs."""
        return 16

    def layout(self, is_keys: bool, head_dim: int) -> PageLayout:
        return uniform_layout(8, head_dim if is_keys else PAGE_TOKENS, head_dim)


@dataclass(frozen=True, slots=True)
class SealedRecords:
    """One layer's sealed pages. The first `exact_tokens` tokens of a sequence are kept as they are.

    `signs` float32 [head_dim] are those of the values' rotation, None where they are not rotated.
    """

    keys: PairRecords | UniformRecords
    values: PairRecords | UniformRecords
    exact_tokens: int
    signs: Tensor | None


@dataclass(frozen=True, slots=True)
class SealedTables:
    """int64: pages before each sequence's own [seqs, pages], its page of first tokens [seqs], and the slots of the pages
    that its new tokens lie in [seqs, own pages]; the rows of the first and the last contiguous."""

    sealed: Tensor
    first: Tensor
    own: Tensor


class _Problem(ctypes.Structure):
    """`SealedProblem` of source/sealed_problem.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "own_keys", "own_values")),
        *((name, ctypes.c_void_p) for name in ("key_table", "value_table", "sealed", "first", "own", "positions")),
        *((name, ctypes.c_void_p) for name in ("signs", "out", "partial", "partial_norm")),
        *((name, ctypes.c_int) for name in ("tokens", "heads", "kv_heads", "window")),
        *((name, ctypes.c_int) for name in ("sealed_stride", "first_stride", "own_stride")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


def can_attend_sealed(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    return (
        dtype in VALUES
        and head_dim in _HEAD_DIMS
        and can_launch(device)
        and _rows_shared_bytes(head_dim, _ROW_WARPS[-1], 1 << 16) <= max_shared_bytes(device)
    )


def attend_sealed(
    q: Tensor,
    pages: SealedRecords,
    own: ExactPages,
    tables: SealedTables,
    positions: Tensor,
    settings: AttentionSettings,
    out: Tensor,
    just_sealed: bool = False,
) -> None:
    """Attend from new tokens whose keys and values are in their own pages already, and from full pages sealed before.

    q [seqs, tokens, heads, head_dim] in the basis of the pages; `own` are pages in bfloat16; positions int64 [seqs, tokens],
    in order. Of a sequence with one token at a negative position, the row of `out`, which is like q but in the model's
    basis, is left as it is. All but tables contiguous. `just_sealed`: pages may have been sealed by the launch before this,
    so they are not read ahead. Waits for nothing and allocates by shapes alone.
    """
    if q.shape[1] == 1:
        attend_sealed_splits(q, pages, own, tables, positions, settings, just_sealed).merged(out)
        return
    _, _, heads, head_dim = q.shape
    problem = _problem(q, pages, own, tables, positions, settings)
    problem.out = out.data_ptr()
    columns = PAGE_TOKENS * heads // problem.kv_heads
    warps = _most_warps(_ROW_WARPS, q.device, lambda count: _rows_shared_bytes(head_dim, count, _table_bytes(pages)))
    while warps > 1 and _COLUMNS * warps // 2 >= columns:
        warps //= 2
    page_tiles = -(-columns // (_COLUMNS * warps))
    constants = defined(**_constants(q, pages, settings), ROW_WARPS=warps)
    shared_bytes = _rows_shared_bytes(head_dim, warps, _table_bytes(pages))
    kernel = load_kernel("attend_sealed_rows", "attend_sealed_rows", constants, shared_bytes)
    grid = (tables.own.shape[1] * page_tiles, problem.kv_heads, len(q))
    kernel.launch(grid, 32 * warps, [problem, *integers(page_tiles)], shared_bytes)


def attend_sealed_splits(
    queries: Tensor | ProjectedHeads,
    pages: SealedRecords,
    own: ExactPages,
    tables: SealedTables,
    positions: Tensor,
    settings: AttentionSettings,
    just_sealed: bool = False,
) -> SplitAttention:
    """`attend_sealed` of one token a sequence, to be merged.

    Queries that come as projected bring the newest keys and values, which go to their own pages, and are of these rows.
    """
    q = queries if isinstance(queries, Tensor) else queries.queries
    sequences, _, heads, head_dim = q.shape
    splits = -(-tables.sealed.shape[1] // _SPLIT_PAGES) + 1
    constants = _constants(q, pages, settings)
    group = heads // own.keys.shape[1]
    constants["TILE_HEADS"] = tile_heads = _NARROW if group <= _NARROW else _COLUMNS
    tiles = own.keys.shape[1] * -(-group // tile_heads)
    warps = _stream_warps(pages, head_dim, q.device)
    # A GPU may lack the shared memory for a single warp's ring.
    few = warps == 0 or sequences * tiles * (splits - 1) <= num_multiprocessors(q.device) * _FEW_SPLITS
    if not few and isinstance(queries, ProjectedHeads):
        q = rotate_and_store(queries)[:, None]
    problem = _problem(q, pages, own, tables, positions, settings)
    partial = torch.empty(sequences, heads, splits, head_dim, device=q.device)
    norms = torch.empty(sequences, heads, splits, 2, device=q.device)
    problem.partial, problem.partial_norm = partial.data_ptr(), norms.data_ptr()
    arguments: list[Argument]
    if few:
        attending, arguments = constants, [problem, *integers(splits)]
        if isinstance(queries, ProjectedHeads):
            attending = {**constants, **queries.constants, "FROM_PROJECTION": 1}
            arguments.append(queries.described())
        shared_bytes = max(_table_bytes(pages), _SPLIT_PAGES * _sums_bytes(head_dim), _own_page_bytes(head_dim))
        kernel = load_kernel("attend_sealed_pages", "attend_sealed_pages", defined(**attending), shared_bytes)
        grid, warps = (splits, tiles, sequences), _SPLIT_PAGES
    else:
        shared_bytes = _table_bytes(pages) + warps * _ring_bytes(pages)
        stream = defined(**constants, STREAM_WARPS=warps, STREAM_SLOTS=_STREAM_SLOTS)
        kernel = load_kernel("attend_sealed_splits", "attend_sealed_splits", stream, shared_bytes)
        grid = (min(num_multiprocessors(q.device), sequences * splits * tiles), 1, 1)
        arguments = [problem, *integers(sequences, splits, tiles)]
    kernel.launch(grid, 32 * warps, arguments, shared_bytes, may_overlap=not just_sealed)
    # A thread a dimension of a head, or of as many heads as a product's tile has columns.
    columns = max(head_dim, TILE_COLUMNS)
    merge = Merge("merge_sealed", "merge_sealed", "merge_sealed_prepare", columns, sequences=1, threads=columns)
    return SplitAttention(q, problem, _merge_constants(constants, splits), splits, merge, (positions, partial, norms))


def _problem(
    q: Tensor,
    pages: SealedRecords,
    own: ExactPages,
    tables: SealedTables,
    positions: Tensor,
    settings: AttentionSettings,
) -> _Problem:
    _, tokens, heads, head_dim = q.shape
    _check_records(pages, head_dim)
    kv_heads = own.keys.shape[1]
    return _Problem(
        *(
            None if tensor is None else tensor.data_ptr()
            for tensor in (
                q,
                pages.keys.records,
                pages.values.records,
                own.keys,
                own.values,
                pages.keys.levels,
                pages.values.levels,
                tables.sealed,
                tables.first,
                tables.own,
                positions,
                pages.signs,
            )
        ),
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        window=settings.window or 0,
        sealed_stride=tables.sealed.stride(0),
        first_stride=tables.first.stride(0),
        own_stride=tables.own.stride(0),
        scale=settings.scale,
        softcap=settings.softcap or 0.0,
    )


def _constants(q: Tensor, pages: SealedRecords, settings: AttentionSettings) -> dict[str, int]:
    return {
        "HEAD_DIM": q.shape[-1],
        "VALUE": VALUES[q.dtype],
        "KEY_BITS": pages.keys.code_bits,
        "VALUE_BITS": pages.values.code_bits,
        "SAME_TABLE": int(pages.keys.levels is pages.values.levels),
        "FIRST_EXACT": pages.exact_tokens,
        "ROTATED_VALUES": int(pages.signs is not None),
        "HAS_WINDOW": int(settings.window is not None),
        "HAS_SOFTCAP": int(settings.softcap is not None),
    }


def _merge_constants(constants: Mapping[str, int], splits: int) -> dict[str, int]:
    """Sums of splits are alike whatever bits their codes had."""
    together = next((count for count in _TOGETHER if splits - 1 <= count), _TOGETHER[-1])
    names = ("HEAD_DIM", "VALUE", "ROTATED_VALUES", "HAS_WINDOW")
    return {name: constants[name] for name in names} | {"MERGED_TOGETHER": together}


def _table_bytes(pages: SealedRecords) -> int:
    """Of both tables, a row for each code, side by side."""
    return 256 * max(_TABLE_ROWS[part.code_bits] for part in (pages.keys, pages.values))


def _sums_bytes(head_dim: int) -> int:
    """Of a warp's columns."""
    return _COLUMNS * head_dim * 4


def _own_page_bytes(head_dim: int) -> int:
    """Of keys and values as they are, with 16 bytes after each row."""
    return 2 * PAGE_TOKENS * (2 * head_dim + 16)


def _rows_shared_bytes(head_dim: int, warps: int, table_bytes: int) -> int:
    return table_bytes + warps * 2 * _sums_bytes(head_dim)


def _ring_bytes(pages: SealedRecords) -> int:
    return _STREAM_SLOTS * max(part.records.shape[2] for part in (pages.keys, pages.values))


def _stream_warps(pages: SealedRecords, head_dim: int, device: torch.device) -> int:
    """Of a block that has a multiprocessor to itself: as many as have room, and few where memory keeps them waiting."""
    room = max_shared_bytes(device) - _STATIC_SHARED_BYTES - _table_bytes(pages)
    best = 12 if max(pages.keys.code_bits, pages.values.code_bits) < 8 and head_dim <= 128 else 8
    return min(best, room // _ring_bytes(pages))


def _most_warps(choices: Sequence[int], device: torch.device, shared_bytes: Callable[[int], int]) -> int:
    """The largest block whose shared memory there is."""
    return next(count for count in choices if shared_bytes(count) <= max_shared_bytes(device))


def _check_records(pages: SealedRecords, head_dim: int) -> None:
    for part, is_keys in ((pages.keys, True), (pages.values, False)):
        expected = part.layout(is_keys, head_dim).num_bytes
        if part.records.shape[2] != expected:
            raise ValueError(f"Records have {part.records.shape[2]} bytes, not the {expected} of their codes.")
