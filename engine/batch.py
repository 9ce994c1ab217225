"""What one step computes, laid out for the model.

Rows are tokens. They are ordered by bit-width, so that each width is one contiguous segment of every linear layer,
and within a width by sequence. Attention, which knows no width, gathers the rows it needs by index.
"""

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from anybit.engine.sequence import Sequence
from anybit.kernels.widths import TileWidths, WidthSegment
from anybit.kvcache.spec import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` pending tokens of a sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether the sequence's newest token is among them, so that the next one can be sampled."""
        return self.num_tokens == self.sequence.num_pending


def by_width(chunks: ReadOnly[Chunk]) -> dict[int, list[Chunk]]:
    """Chunks by the bit-width that their rows are computed at, narrow ones first, each in the order given.

    Who asked for at least some width is lifted to the widest that a chunk of the step needs.
    """
    widest = max((chunk.sequence.bit_width for chunk in chunks), default=0)
    found: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        precision = chunk.sequence.request.precision
        found.setdefault(widest if precision.at_least else precision.bit_width, []).append(chunk)
    return dict(sorted(found.items()))


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

    With `tile_widths` rows are at the widths that these name, four by four, and `segments` says nothing.
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
    tile_widths: TileWidths | None = None


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
        page_ids += [sequence.pages[position // PAGE_SIZE] for position in new_positions]
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
    groups = _attention_groups(ordered, first_rows)
    tensors = _tensors(
        [
            token_ids,
            positions,
            page_ids,
            [position % PAGE_SIZE for position in positions],
            [row for row, _ in completing],
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
            for first, group in zip(range(5, len(tensors), 3), groups, strict=True)
        ),
        sampled_rows=tensors[4],
        sampled=tuple(sequence for _, sequence in completing),
        scored=tuple(
            scored
            for row, chunk in zip(first_rows, ordered, strict=True)
            if chunk.sequence.wants_prompt_logprobs and (scored := _scored_rows(chunk, row, device)) is not None
        ),
    )


def _tensors(lists: ReadOnly[list[int]], device: torch.device | str) -> tuple[Tensor, ...]:
    """Views of one int64 tensor, as making many small ones would take longer than a layer."""
    flat = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64, device=device)
    return torch.split(flat, [len(values) for values in lists])


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


def _attention_groups(chunks: ReadOnly[Chunk], first_rows: ReadOnly[int]) -> list[_GroupLists]:
    by_length: dict[int, list[tuple[Chunk, int]]] = {}
    for chunk, row in zip(chunks, first_rows, strict=True):
        by_length.setdefault(chunk.num_tokens, []).append((chunk, row))
    groups = []
    for num_tokens, members in by_length.items():
        # Several long prompts side by side would pad each other's history: only single tokens share a group.
        for part in [members] if num_tokens == 1 else [[member] for member in members]:
            groups.append(_attention_group(part, num_tokens))
    return groups


def _attention_group(members: ReadOnly[tuple[Chunk, int]], num_tokens: int) -> _GroupLists:
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
