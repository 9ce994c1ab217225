"""What one step computes, laid out for the model.

Rows are tokens. They are ordered by bit-width, so that each width is one contiguous segment of every linear layer,
and within a width by sequence. Attention, which knows no width, gathers the rows it needs by index.
"""

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from anybit.engine.chunk import Chunk, PlacedChunk, attended_together, by_width
from anybit.engine.int64_tensors import int64_tensors
from anybit.engine.kv.sealed_batch import SealedRows, sealed_rows
from anybit.engine.sequence import Sequence
from anybit.kernels.widths import RowWidths, WidthSegment
from anybit.kvcache.formats import EXACT_FORMATS, is_exact
from anybit.kvcache.spec import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Sequences with the same number of new tokens, attended together."""

    row_ids: Tensor  # int64 [seqs, tokens]
    block_tables: Tensor  # int64 [seqs, max_pages]
    positions: Tensor  # int64 [seqs, tokens]


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Rows of one sequence whose next tokens are known and asked for: `token_ids[i]` follows row `row_ids[i]`."""

    sequence: Sequence
    row_ids: Tensor  # int64 [scored]
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Inputs of one forward pass. `sampled` lists the sequences of `sampled_rows`, in order.

    Rows of exact formats are in `attention_groups`, others in `sealed`: these are written to exact pages as well, their own.
    With `row_widths` rows are at the widths that these name, and `segments` says nothing.
    """

    token_ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    page_ids: Tensor  # int64 [rows]: where each row's keys and values go
    page_offsets: Tensor  # int64 [rows]
    segments: tuple[WidthSegment, ...]
    attention_groups: tuple[AttentionGroup, ...]
    sampled_rows: Tensor  # int64 [sampled]
    sampled: tuple[Sequence, ...]
    scored: tuple[ScoredRows, ...]
    sealed: tuple[SealedRows, ...] = ()
    row_formats: Tensor | None = (
        None  # int64 [rows]: places in `sealed`, -1 for exact formats; None if nothing is sealed
    )
    row_widths: RowWidths | None = None


def plan_batch(chunks: ReadOnly[Chunk], device: torch.device | str = "cpu") -> BatchPlan:
    """Lay out chunks of sequences that own enough pages."""
    widths = by_width(chunks)
    ordered = list(chain.from_iterable(widths.values()))
    token_ids: list[int] = []
    positions: list[int] = []
    page_ids: list[int] = []
    first_rows: list[int] = []
    for chunk in ordered:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        row = len(token_ids)
        first_rows.append(row)
        token_ids += sequence.token_ids[start : start + chunk.num_tokens]
        new_positions = range(start, start + chunk.num_tokens)
        positions += new_positions
        own_pages, first_page = _written_pages(sequence)
        page_ids += [own_pages[position // PAGE_SIZE - first_page] for position in new_positions]
    segments: list[WidthSegment] = []
    stop = 0
    for width, members in widths.items():
        start, stop = stop, stop + sum(chunk.num_tokens for chunk in members)
        segments.append((width, start, stop))

    completing = [
        (row + chunk.num_tokens - 1, chunk.sequence)
        for row, chunk in zip(first_rows, ordered, strict=True)
        if chunk.completes
    ]
    placed = list(zip(ordered, first_rows, strict=True))
    groups = _attention_groups([place for place in placed if is_exact(place[0].sequence.kv_format)])
    sealed_formats = sorted({chunk.sequence.kv_format for chunk in ordered} - EXACT_FORMATS.keys())
    numbers = {name: number for number, name in enumerate(sealed_formats)}
    row_formats: list[int] = []
    for chunk in ordered if sealed_formats else ():
        row_formats += [numbers.get(chunk.sequence.kv_format, -1)] * chunk.num_tokens
    tensors = int64_tensors(
        [
            token_ids,
            positions,
            page_ids,
            [position % PAGE_SIZE for position in positions],
            [row for row, _ in completing],
            row_formats,
            *(part for group in groups for part in (group.row_ids, group.block_tables, group.positions)),
        ],
        device,
    )
    return BatchPlan(
        token_ids=tensors[0],
        positions=tensors[1],
        page_ids=tensors[2],
        page_offsets=tensors[3],
        segments=tuple(segments),
        attention_groups=tuple(
            AttentionGroup(*(part.view(group.num_seqs, -1) for part in tensors[first : first + 3]))
            for first, group in zip(range(6, len(tensors), 3), groups, strict=True)
        ),
        sampled_rows=tensors[4],
        sampled=tuple(sequence for _, sequence in completing),
        scored=tuple(
            scored
            for row, chunk in zip(first_rows, ordered, strict=True)
            if chunk.sequence.wants_prompt_logprobs and (scored := _scored_rows(chunk, row, device)) is not None
        ),
        sealed=tuple(
            sealed_rows(name, [place for place in placed if place[0].sequence.kv_format == name], device)
            for name in sealed_formats
        ),
        row_formats=tensors[5] if sealed_formats else None,
    )


def _written_pages(sequence: Sequence) -> tuple[list[int], int]:
    """Exact pages that a sequence's new tokens are written to, and the number of the first of them."""
    if is_exact(sequence.kv_format):
        return sequence.pages, 0
    return sequence.own_slots, sequence.num_computed // PAGE_SIZE


def _scored_rows(chunk: Chunk, first_row: int, device: torch.device | str) -> ScoredRows | None:
    sequence, start = chunk.sequence, chunk.sequence.num_computed
    # Row p predicts token p + 1. After a preemption rows are computed again, but their scores are known.
    first = max(start, sequence.num_scored)
    last = min(start + chunk.num_tokens, sequence.num_prompt_tokens - 1)
    if first >= last:
        return None
    row_ids = torch.arange(first_row + first - start, first_row + last - start, device=device)
    return ScoredRows(sequence, row_ids, sequence.token_ids[first + 1 : last + 1])


@dataclass(frozen=True, slots=True)
class _GroupLists:
    """An AttentionGroup as flat lists."""

    num_seqs: int
    row_ids: list[int]
    block_tables: list[int]
    positions: list[int]


def _attention_groups(placed: ReadOnly[PlacedChunk]) -> list[_GroupLists]:
    return [_attention_group(part, num_tokens) for num_tokens, part in attended_together(placed)]


def _attention_group(members: ReadOnly[PlacedChunk], num_tokens: int) -> _GroupLists:
    row_ids: list[int] = []
    positions: list[int] = []
    tables: list[list[int]] = []
    for chunk, row in members:
        start = chunk.sequence.num_computed
        row_ids += range(row, row + num_tokens)
        positions += range(start, start + num_tokens)
        tables.append(chunk.sequence.pages[: (start + num_tokens - 1) // PAGE_SIZE + 1])
    longest = max(map(len, tables))
    padded = [page for table in tables for page in table + [table[0]] * (longest - len(table))]
    return _GroupLists(len(members), row_ids, padded, positions)
