"""What one step writes, seals and attends to in the pages of a sealed format (`kvcache.sealed_pool`)."""

from collections.abc import Iterable
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.engine.chunk import PlacedChunk, attended_together
from anybit.engine.int64_tensors import int64_tensors
from anybit.engine.sequence import Sequence
from anybit.kvcache.attention import PageTables
from anybit.kvcache.sealed_pool import Seals
from anybit.kvcache.spec import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class SealedGroup:
    """Sequences with the same number of new tokens, attended together."""

    row_ids: Tensor  # int64 [seqs, tokens]
    positions: Tensor  # int64 [seqs, tokens]
    tables: PageTables


@dataclass(frozen=True, slots=True)
class SealedRows:
    """The rows of one sealed format: where they attend, and which pages are full, and so sealed, once they are written."""

    kv_format: str
    row_ids: Tensor  # int64 [rows]
    seals: Seals | None
    groups: tuple[SealedGroup, ...]


def sealed_rows(kv_format: str, placed: ReadOnly[PlacedChunk], device: torch.device | str) -> SealedRows:
    """Of chunks of this format, whose sequences have their own slots."""

    rows = [row + token for chunk, row in placed for token in range(chunk.num_tokens)]
    groups = tuple(_group(members, num_tokens, device) for num_tokens, members in attended_together(placed))
    seals = seals_of([(chunk.sequence, chunk.sequence.num_computed, chunk.num_tokens) for chunk, _ in placed], device)
    (row_ids,) = int64_tensors([rows], device)
    return SealedRows(kv_format, row_ids, seals, groups)


def seals_of(written: Iterable[tuple[Sequence, int, int]], device: torch.device | str) -> Seals | None:
    """Pages that are full once sequences have written so many tokens from a position on, which their own slots reach."""
    lists: tuple[list[int], ...] = ([], [], [], [], [])
    slots, page_ids, first_slots, first_page_ids, numbers = lists
    for sequence, start, num_tokens in written:
        first, full = start // PAGE_SIZE, (start + num_tokens) // PAGE_SIZE
        if first == full:
            continue
        own = sequence.own_slots[first - sequence.num_computed // PAGE_SIZE :]
        slots += own[: full - first]
        page_ids += sequence.pages[1 + first : 1 + full]
        numbers += range(full - first)
        if first == 0:
            first_slots.append(own[0])
            first_page_ids.append(sequence.pages[0])
    return Seals(*int64_tensors(lists, device)) if slots else None


def _group(members: ReadOnly[PlacedChunk], num_tokens: int, device: torch.device | str) -> SealedGroup:
    sealed: list[list[int]] = []
    own: list[list[int]] = []
    starts = [chunk.sequence.num_computed for chunk, _ in members]
    for (chunk, _), start in zip(members, starts, strict=True):
        last = (start + num_tokens - 1) // PAGE_SIZE
        sealed.append(chunk.sequence.pages[1 : 1 + last])
        own.append(chunk.sequence.own_slots[: last - start // PAGE_SIZE + 1])
    first_rows = torch.tensor([row for _, row in members], device=device)
    first_positions = torch.tensor(starts, device=device)
    tokens = torch.arange(num_tokens, device=device)
    tables = PageTables(
        _padded(sealed, device),
        torch.tensor([chunk.sequence.pages[0] for chunk, _ in members], device=device),
        _padded(own, device),
        first_positions // PAGE_SIZE,
    )
    return SealedGroup(first_rows[:, None] + tokens, first_positions[:, None] + tokens, tables)


def _padded(tables: list[list[int]], device: torch.device | str) -> Tensor:
    longest = max(map(len, tables))
    rows = [table + [-1] * (longest - len(table)) for table in tables]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(tables), longest)
