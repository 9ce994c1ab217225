"""What a captured decode step is given: where it lies in the memory that graphs read, and how sequences fill it."""

from collections.abc import Mapping
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass
from itertools import cycle
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from anybit.engine.batch import AttentionGroup, BatchPlan
from anybit.engine.kv.sealed_batch import SealedGroup, SealedRows
from anybit.engine.sampling import NOT_DRAWN, NUM_SETTINGS, draw_settings
from anybit.engine.sequence import Sequence
from anybit.kernels.cuda.activations import num_token_tiles
from anybit.kernels.cuda.fragments import TILE_TOKENS
from anybit.kernels.widths import NO_WIDTH, RowWidths
from anybit.kvcache.attention import PageTables
from anybit.kvcache.formats import is_exact
from anybit.kvcache.spec import PAGE_SIZE

_PLACES = 4  # of a row: token, position, page, offset
_NOT_OF_FORMAT = -1


@dataclass(frozen=True, slots=True)
class StepShape:
    """Padded rows, the bit-widths and KV formats among them, pages of a block table, and whether the step draws tokens."""

    num_rows: int
    widths: tuple[int, ...]
    table_pages: int
    has_draws: bool = False
    kv_formats: tuple[str, ...] = ("bf16",)

    @property
    def is_mixed(self) -> bool:
        return len(self.widths) > 1

    @property
    def num_widths(self) -> int:
        """Rows that are told their width, those included that pad a pass of a product."""
        return TILE_TOKENS * num_token_tiles(self.num_rows) if self.is_mixed else 0

    @property
    def sealed_formats(self) -> tuple[str, ...]:
        return tuple(name for name in self.kv_formats if not is_exact(name))


class DecodeRow(NamedTuple):
    """Where a sequence stands in a step, and the width it is computed at there."""

    row: int
    bit_width: int


class StepInputs:
    """Inputs of steps of one shape, int64 in one piece; rows that no sequence stands in are padding.

    A step may be launched while the one before it runs, so what is copied to the GPU has two places on the host.
    """

    def __init__(self, shape: StepShape, scratch_page: int, device: torch.device) -> None:
        self._shape = shape
        self._scratch_page = scratch_page
        rows = shape.num_rows
        sealed = bool(shape.sealed_formats)
        self._sections = {
            "places": (_PLACES, rows),
            "row_formats": (rows if sealed else 0,),
            "attention_positions": (len(shape.kv_formats) if sealed else 0, rows),
            "tables": (rows, shape.table_pages),
            "row_widths": (shape.num_widths,),
            "draws": (NUM_SETTINGS if shape.has_draws else 0, rows),
        }
        size = sum(map(prod, self._sections.values()))
        self._hosts = cycle([torch.empty(size, dtype=torch.int64, pin_memory=True) for _ in range(2)])
        self._inputs = torch.empty(size, dtype=torch.int64, device=device)
        self._parts = self._split(self._inputs)
        self.fill((), (), 0)

    @property
    def token_ids(self) -> Tensor:
        return self._parts["places"][0]

    @property
    def draws(self) -> Tensor:
        """Settings float64 [NUM_SETTINGS, rows], as `next_tokens` takes them."""
        return self._parts["draws"].view(torch.float64)

    def fill(self, sequences: ReadOnly[Sequence], rows: ReadOnly[DecodeRow], ahead: int) -> None:
        """Write each sequence's newest token, or with `ahead` 1 the place of the one after it, which the GPU alone knows."""
        source = next(self._hosts)
        parts = self._split(source)
        places, tables, row_widths, row_formats, positions = (
            parts[name].numpy() for name in ("places", "tables", "row_widths", "row_formats", "attention_positions")
        )
        row_widths[:] = NO_WIDTH
        places[:] = 0
        places[2] = self._scratch_page
        tables[:] = self._scratch_page
        formats, sealed = self._shape.kv_formats, self._shape.sealed_formats
        numbers = {name: sealed.index(name) if name in sealed else _NOT_OF_FORMAT for name in formats}
        if sealed:  # what pads is of the first format
            row_formats[:] = numbers[formats[0]]
            positions[0] = 0
            positions[1:] = -1
        for (row, width), sequence in zip(rows, sequences, strict=True):
            position = sequence.num_computed + ahead
            token = 0 if ahead else sequence.token_ids[position]
            places[:, row] = (token, position, sequence.page_of(position), position % PAGE_SIZE)
            tables[row, : len(sequence.pages)] = sequence.pages
            if sealed:
                row_formats[row] = numbers[sequence.kv_format]
                positions[:, row] = -1
                positions[formats.index(sequence.kv_format), row] = position
            if self._shape.is_mixed:
                row_widths[row] = width
        if self._shape.has_draws:
            settings = parts["draws"].view(torch.float64)
            settings[:] = torch.tensor(NOT_DRAWN, dtype=torch.float64)[:, None]
            columns = [row for row, _ in rows]
            params = [sequence.request.sampling for sequence in sequences]
            settings[:, columns] = draw_settings(params, [sequence.num_generated + ahead for sequence in sequences])
        self._inputs.copy_(source, non_blocking=True)

    def plan(self) -> BatchPlan:
        """A step over these inputs. Rows of a format are those that its attention has a position for."""
        shape, device = self._shape, self._inputs.device
        token_ids, positions, page_ids, page_offsets = self._parts["places"]
        tables = self._parts["tables"]
        row_ids = torch.arange(shape.num_rows, device=device)
        exact: list[AttentionGroup] = []
        sealed: list[SealedRows] = []
        for number, name in enumerate(shape.kv_formats):
            seen = (self._parts["attention_positions"][number] if shape.sealed_formats else positions)[:, None]
            if is_exact(name):
                exact.append(AttentionGroup(row_ids[:, None], tables, seen))
            else:
                pages = PageTables(tables[:, 1:], tables[:, 0], page_ids[:, None], seen[:, 0] // PAGE_SIZE)
                sealed.append(SealedRows(name, row_ids, None, (SealedGroup(row_ids[:, None], seen, pages),)))
        return BatchPlan(
            token_ids=token_ids,
            positions=positions,
            page_ids=page_ids,
            page_offsets=page_offsets,
            segments=((shape.widths[0], 0, shape.num_rows),),
            attention_groups=tuple(exact),
            sampled_rows=row_ids,
            sampled=(),
            scored=(),
            sealed=tuple(sealed),
            row_formats=self._parts["row_formats"] if sealed else None,
            row_widths=RowWidths(shape.widths, self._parts["row_widths"]) if shape.is_mixed else None,
        )

    def _split(self, flat: Tensor) -> Mapping[str, Tensor]:
        parts = torch.split(flat, [prod(size) for size in self._sections.values()])
        return {name: part.view(size) for part, (name, size) in zip(parts, self._sections.items(), strict=True)}
