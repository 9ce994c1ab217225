"""What one step computes, laid out for the model.

Rows are tokens. They are ordered by bit-width, so that each width is one contiguous segment of every linear layer,
and within a width by sequence. Attention, which knows no width, gathers the rows it needs by index.
"""

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.engine.sequence import Sequence
from anybit.kernels.dispatch import WidthSegment
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
    """Inputs of one forward pass. `sampled` lists the sequences of `sampled_rows`, in order."""

    token_ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    page_ids: Tensor  # int64 [rows]: where each row's keys and values go
    page_offsets: Tensor  # int64 [rows]
    segments: tuple[WidthSegment, ...]
    attention_groups: tuple[AttentionGroup, ...]
    sampled_rows: Tensor  # int64 [sampled]
    sampled: tuple[Sequence, ...]
    scored: tuple[ScoredRows, ...]


def plan_batch(chunks: ReadOnly[Chunk], device: torch.device | str = "cpu") -> BatchPlan:
    """Lay out chunks of sequences that own enough pages."""
    ordered = sorted(chunks, key=lambda chunk: chunk.sequence.bit_width)  # stable: arrival order within a width
    token_ids: list[int] = []
    positions: list[int] = []
    page_ids: list[int] = []
    segments: list[WidthSegment] = []
    first_rows: list[int] = []
    for chunk in ordered:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        row = len(token_ids)
        first_rows.append(row)
        token_ids += sequence.token_ids[start : start + chunk.num_tokens]
        new_positions = range(start, start + chunk.num_tokens)
        positions += new_positions
        page_ids += [sequence.pages[position // PAGE_SIZE] for position in new_positions]
        if segments and segments[-1][0] == sequence.bit_width:
            segments[-1] = (sequence.bit_width, segments[-1][1], len(token_ids))
        else:
            segments.append((sequence.bit_width, row, len(token_ids)))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    row_positions = tensor(positions)
    completing = [
        (row + chunk.num_tokens - 1, chunk.sequence)
        for row, chunk in zip(first_rows, ordered, strict=True)
        if chunk.completes
    ]
    return BatchPlan(
        token_ids=tensor(token_ids),
        positions=row_positions,
        page_ids=tensor(page_ids),
        page_offsets=row_positions % PAGE_SIZE,
        segments=tuple(segments),
        attention_groups=_attention_groups(ordered, first_rows, row_positions),
        sampled_rows=tensor([row for row, _ in completing]),
        sampled=tuple(sequence for _, sequence in completing),
        scored=tuple(
            scored
            for row, chunk in zip(first_rows, ordered, strict=True)
            if chunk.sequence.wants_prompt_logprobs and (scored := _scored_rows(chunk, row, device)) is not None
        ),
    )


def _scored_rows(chunk: Chunk, first_row: int, device: torch.device | str) -> ScoredRows | None:
    sequence, start = chunk.sequence, chunk.sequence.num_computed
    # Row p predicts token p + 1. After a preemption rows are computed again, but their scores are known.
    first = max(start, sequence.num_scored)
    last = min(start + chunk.num_tokens, sequence.num_prompt_tokens - 1)
    if first >= last:
        return None
    row_ids = torch.arange(first_row + first - start, first_row + last - start, device=device)
    return ScoredRows(sequence, row_ids, sequence.token_ids[first + 1 : last + 1])


def _attention_groups(
    chunks: ReadOnly[Chunk], first_rows: ReadOnly[int], positions: Tensor
) -> tuple[AttentionGroup, ...]:
    by_length: dict[int, list[tuple[Chunk, int]]] = {}
    for chunk, row in zip(chunks, first_rows, strict=True):
        by_length.setdefault(chunk.num_tokens, []).append((chunk, row))
    groups = []
    for num_tokens, members in by_length.items():
        # Several long prompts side by side would pad each other's history: only single tokens share a group.
        for part in [members] if num_tokens == 1 else [[member] for member in members]:
            groups.append(_attention_group(part, num_tokens, positions))
    return tuple(groups)


def _attention_group(members: ReadOnly[tuple[Chunk, int]], num_tokens: int, positions: Tensor) -> AttentionGroup:
    device = positions.device
    rows = torch.tensor([row for _, row in members], device=device)[:, None] + torch.arange(num_tokens, device=device)
    tables = []
    for chunk, _ in members:
        last = chunk.sequence.num_computed + num_tokens - 1
        tables.append(chunk.sequence.pages[: last // PAGE_SIZE + 1])
    longest = max(map(len, tables))
    padded = [table + [table[0]] * (longest - len(table)) for table in tables]
    return AttentionGroup(rows, torch.tensor(padded, device=device), positions[rows])
