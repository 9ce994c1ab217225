"""Attention of one new token a sequence over sealed pages on an NVIDIA GPU, without decoding them."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels.attention_inputs import AttentionSettings, ExactPages
from anybit.kernels.cuda.driver import can_launch, defined, integers, load_kernel, max_shared_bytes, pointers
from anybit.kernels.cuda.values import VALUES
from anybit.kernels.page_layout import pair_layout

_WARPS = 8  # of a block, as in source/sealed_attention.cu, like the numbers below
_WARP_PAGES = 2
_HEADS = 8  # of a tile
_HEAD_DIMS = (64, 128, 256)
_COPIES = 32  # of a table, one for each lane; entries of 8 bytes, for half of them


@dataclass(frozen=True, slots=True)
class PairRecords:
    """Records of keys or of values, uint8 [pages, kv_heads, bytes], and what their codes stand for, float16 [2^bits, 2]."""

    records: Tensor
    levels: Tensor

    @property
    def code_bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @property
    def table_bytes(self) -> int:
        """Of the copies in shared memory; two codes of 4 bits are looked up at once."""
        return 256 * 8 * _COPIES // 2 if self.code_bits == 4 else len(self.levels) * 4 * _COPIES


@dataclass(frozen=True, slots=True)
class SealedTables:
    """int64: pages before each sequence's own [seqs, pages], its page of first tokens [seqs], its own page [seqs]."""

    sealed: Tensor
    first: Tensor
    own: Tensor


class _Problem(ctypes.Structure):
    """`SealedProblem` of source/sealed_attention.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "own_keys", "own_values")),
        *((name, ctypes.c_void_p) for name in ("key_table", "value_table", "sealed", "first", "own", "positions")),
        *((name, ctypes.c_void_p) for name in ("partial", "partial_norm")),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads", "table_pages", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


def can_attend_sealed(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    return dtype in VALUES and head_dim in _HEAD_DIMS and device.type == "cuda" and can_launch(device)


def attend_sealed(
    q: Tensor,
    keys: PairRecords,
    values: PairRecords,
    own: ExactPages,
    tables: SealedTables,
    positions: Tensor,
    exact_tokens: int,
    settings: AttentionSettings,
) -> Tensor:
    """q [seqs, heads, head_dim] in the basis of the pages -> float32 of the same shape, in that basis.

    `own` are pages in bfloat16; positions int64 [seqs], whose keys are in the own pages;
    the first `exact_tokens` tokens of a sequence are kept as they are. All tensors contiguous. Waits for nothing and
    allocates by the width of the tables alone.
    """
    sequences, heads, head_dim = q.shape
    kv_heads = own.keys.shape[1]
    _check_records(keys, values, head_dim)
    split_pages = _WARPS * _WARP_PAGES
    splits = -(-tables.sealed.shape[1] // split_pages) + 1
    partial = torch.empty(sequences, heads, splits, head_dim, device=q.device)
    norms = torch.empty(sequences, heads, splits, 2, device=q.device)
    out = torch.empty(sequences, heads, head_dim, device=q.device)
    constants = defined(
        HEAD_DIM=head_dim,
        VALUE=VALUES[q.dtype],
        KEY_BITS=keys.code_bits,
        VALUE_BITS=values.code_bits,
        SAME_TABLE=int(keys.levels is values.levels),
        FIRST_EXACT=exact_tokens,
        WARP_PAGES=_WARP_PAGES,
        HAS_WINDOW=int(settings.window is not None),
        HAS_SOFTCAP=int(settings.softcap is not None),
    )
    problem = _Problem(
        *(
            tensor.data_ptr()
            for tensor in (
                q,
                keys.records,
                values.records,
                own.keys,
                own.values,
                keys.levels,
                values.levels,
                tables.sealed,
                tables.first,
                tables.own,
                positions,
                partial,
                norms,
            )
        ),
        heads=heads,
        kv_heads=kv_heads,
        table_pages=tables.sealed.shape[1],
        window=settings.window or 0,
        scale=settings.scale,
        softcap=settings.softcap or 0.0,
    )
    table_bytes = keys.table_bytes + (0 if keys.levels is values.levels else values.table_bytes)
    shared_bytes = max(table_bytes, _WARPS * _HEADS * head_dim * 4)
    if shared_bytes > max_shared_bytes(q.device):
        raise ValueError(f"Heads of {head_dim} need more shared memory than a block of this GPU has.")
    row_tiles = -(-(heads // kv_heads) // _HEADS)
    kernel = load_kernel("sealed_attention", "attend_sealed", constants, shared_bytes)
    kernel.launch((splits, kv_heads * row_tiles, sequences), 32 * _WARPS, [problem, *integers(splits)], shared_bytes)
    merge = load_kernel("sealed_attention", "merge_sealed", constants)
    merge.launch((heads, sequences, 1), head_dim, [problem, *pointers(out), *integers(splits)])
    return out


def _check_records(keys: PairRecords, values: PairRecords, head_dim: int) -> None:
    for part, has_mean in ((keys, True), (values, False)):
        expected = pair_layout(part.code_bits, has_mean, head_dim).num_bytes
        if part.records.shape[2] != expected:
            raise ValueError(f"Records have {part.records.shape[2]} bytes, not the {expected} of their codes.")
