"""Sealed pages for the native CPU step: how they are described to it, and steps cut so that it need not seal any.

A query reads the pages before its own as codes, and its own as it was written. Rows that lie in one page of each sequence
are computed together; the pages that are full then are sealed before the rows of the next pages follow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.engine.batch import BatchPlan
from anybit.engine.kv.sealed_batch import SealedGroup, SealedRows
from anybit.kernels.cpu.sealed_pages import PairRecords, StackSealedPages
from anybit.kernels.cpu.stack import StackGroup
from anybit.kernels.widths import WidthSegment
from anybit.kvcache.codec.pages import CoarseCodec, PageCodec, PairCodec
from anybit.kvcache.codec.pairs import PairTable
from anybit.kvcache.sealed_pool import SealedLayer, Seals
from anybit.kvcache.spec import PAGE_SIZE


def can_describe(layer: SealedLayer) -> bool:
    """Whether the native step reads pages of this format: of ordered pairs, both keys and values."""
    return all(isinstance(codec, PairCodec | CoarseCodec) for codec in layer.pages.codecs)


def describe_layer(layer: SealedLayer) -> StackSealedPages:
    """For a layer that `can_describe` admits."""
    keys, values = (
        _describe_records(records, codec, has_mean)
        for records, codec, has_mean in zip(
            (layer.pages.keys, layer.pages.values), layer.pages.codecs, (True, False), strict=True
        )
    )
    return StackSealedPages(keys, values, layer.pages.exact_tokens, layer.basis.weights, layer.basis.signs)


def _describe_records(records: Tensor, codec: PageCodec, has_mean: bool) -> PairRecords:
    if not isinstance(codec, PairCodec | CoarseCodec) or not isinstance(codec.table, PairTable):
        raise ValueError("The native step reads pages of ordered pairs alone.")
    table = codec.table
    levels = codec.levels if isinstance(codec, CoarseCodec) else table.levels
    return PairRecords(records, levels, table.entries, table.clusters, has_mean)


@dataclass(frozen=True, slots=True)
class PagePart:
    """Rows of a plan that are computed in one call, and what is sealed after it, by format."""

    row_ids: Tensor  # int64 [rows], ascending
    segments: list[WidthSegment]
    groups: list[StackGroup]
    row_formats: Tensor  # int64 [rows]
    seals: list[tuple[str, Seals]]


def parts_by_page(plan: BatchPlan, formats: Sequence[str]) -> Iterator[PagePart]:
    """In the order in which they are computed; exact formats' rows are all in the first."""
    num_parts = max(_num_own_pages(group) for rows in plan.sealed for group in rows.groups)
    # Exact rows have the number -1 in the plan, and so the last one here.
    numbers = torch.tensor([*(formats.index(rows.kv_format) for rows in plan.sealed), -1])
    all_formats = numbers[plan.row_formats]
    for number in range(num_parts):
        chosen = [(rows, group, _tokens_of_page(group, number)) for rows in plan.sealed for group in rows.groups]
        chosen = [(rows, group, tokens) for rows, group, tokens in chosen if tokens.start < tokens.stop]
        exact = plan.attention_groups if number == 0 else ()
        used = [group.row_ids.flatten() for group in exact]
        used += [group.row_ids[:, tokens].flatten() for _, group, tokens in chosen]
        row_ids = torch.cat(used).sort().values
        place = torch.zeros(len(plan.positions), dtype=torch.int64)
        place[row_ids] = torch.arange(len(row_ids))
        groups = [StackGroup(place[group.row_ids], group.block_tables) for group in exact]
        groups += [_group(rows, group, tokens, number, place, formats) for rows, group, tokens in chosen]
        starts = torch.searchsorted(row_ids, torch.tensor([start for _, start, _ in plan.segments]))
        stops = torch.searchsorted(row_ids, torch.tensor([stop for _, _, stop in plan.segments]))
        yield PagePart(
            row_ids,
            [
                (width, start, stop)
                for (width, _, _), start, stop in zip(plan.segments, starts.tolist(), stops.tolist(), strict=True)
                if start < stop
            ],
            groups,
            all_formats[row_ids],
            [
                (rows.kv_format, seals)
                for rows in plan.sealed
                if rows.seals is not None and (seals := rows.seals.of_number(number)) is not None
            ],
        )


def _num_own_pages(group: SealedGroup) -> int:
    return int((group.positions[:, -1] // PAGE_SIZE - group.tables.first_own).max()) + 1


def _tokens_of_page(group: SealedGroup, number: int) -> slice:
    """Of a group of one token each all or none; longer ones have a single sequence."""
    own = group.positions[0] // PAGE_SIZE - group.tables.first_own[0]
    return slice(int((own < number).sum()), int((own <= number).sum()))


def _group(
    rows: SealedRows, group: SealedGroup, tokens: slice, number: int, place: Tensor, formats: Sequence[str]
) -> StackGroup:
    """One table of sealed pages and, as the last of a sequence, the exact one that the tokens lie in."""
    own = group.tables.first_own + number
    table = torch.zeros(len(own), int(own.max()) + 1, dtype=torch.int64)
    width = min(table.shape[1], group.tables.sealed.shape[1])
    table[:, :width] = group.tables.sealed[:, :width].clamp_min(0)
    table.scatter_(1, own[:, None], group.tables.own[:, number : number + 1])
    row_ids = place[group.row_ids[:, tokens]].contiguous()
    return StackGroup(row_ids, table, formats.index(rows.kv_format), group.tables.first.contiguous())
