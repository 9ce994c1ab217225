"""Steps of one token a sequence on a GPU, captured as CUDA graphs: a step is one launch, whatever the number of layers.

A graph's shape is a padded number of rows, the set of their bit-widths and a padded number of pages; it is captured when a
step first needs it. Where widths meet, which rows have which is an input. Rows that pad write to the pool's scratch page.
All graphs read the same weights and pages, so a new width or batch size moves nothing.
"""

from collections.abc import Iterable
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybit.engine.batch import AttentionGroup, BatchPlan
from anybit.engine.chunk import Chunk, by_width
from anybit.engine.models.cuda_layers import CudaLayers
from anybit.engine.models.decoder import Decoder
from anybit.engine.sampling import NOT_DRAWN, NUM_SETTINGS, FoundTokens, draw_settings, next_tokens
from anybit.engine.sequence import Sequence
from anybit.kernels import dispatch
from anybit.kernels.cuda.activations import num_token_tiles
from anybit.kernels.cuda.fragments import TILE_TOKENS
from anybit.kernels.layout import BIT_WIDTHS
from anybit.kernels.widths import MIXED_ROWS, NO_WIDTH, TileWidths
from anybit.kvcache.pool import KVPool
from anybit.kvcache.spec import PAGE_SIZE

_MAX_ROWS = 256
_FEWEST_PAGES, _MORE_PAGES = 8, 4  # tables have 8, 32, 128, ... pages
_ROW_FIELDS = 4  # token, position, page, offset
_MAX_SHAPES = 64
_WARM_UP_RUNS = 2  # kernels are compiled and loaded before the capture


@dataclass(frozen=True, slots=True)
class StepShape:
    """Padded rows, the bit-widths among them, pages of a block table, and whether the step draws tokens."""

    num_rows: int
    widths: tuple[int, ...]
    table_pages: int
    has_draws: bool = False

    @property
    def is_mixed(self) -> bool:
        return len(self.widths) > 1

    @property
    def num_tiles(self) -> int:
        """N-tiles of rows that have one width each, those that pad a pass included."""
        return num_token_tiles(self.num_rows) if self.is_mixed else 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """Logits float32 [sequences, vocab], and what the step itself has made of them."""

    logits: Tensor
    found: FoundTokens


class DecodeRow(NamedTuple):
    """Where a sequence stands in a step, and the width it is computed at there."""

    row: int
    bit_width: int


@dataclass(frozen=True, slots=True)
class LaunchedDecode:
    """A step that the GPU has been given; `rows` are those of its sequences."""

    sequences: tuple[Sequence, ...]
    rows: tuple[DecodeRow, ...]
    shape: StepShape
    logits: Tensor
    tokens: Tensor  # `FoundTokens` of all rows: int64 [padded rows], on the GPU
    copied: Tensor  # the same on the host, once `done`
    done: torch.cuda.Event

    def result(self) -> StepResult:
        """Wait for the step. The logits are overwritten by the next one."""
        self.done.synchronize()
        tokens = self.copied.tolist()
        rows = [row for row, _ in self.rows]
        logits = self.logits[: len(rows)] if rows == list(range(len(rows))) else self.logits[rows]
        return StepResult(logits, FoundTokens([tokens[row] for row in rows], self.shape.has_draws))


class DecodeGraphs:
    """Captures and replays the decode steps of one decoder over one pool."""

    def __init__(self, decoder: Decoder, pool: KVPool) -> None:
        self._decoder = decoder
        self._pool = pool
        self._memory = torch.cuda.graph_pool_handle()
        most_rows = padded_rows(_MAX_ROWS + MIXED_ROWS * len(BIT_WIDTHS))
        self._logits = torch.empty(most_rows, decoder.config.vocab_size, device=decoder.device)
        self._steps: dict[StepShape, _CapturedStep] = {}  # the least recently used first

    @staticmethod
    def can_serve(decoder: Decoder, pool: KVPool) -> bool:
        """Whether all layers, over these pages, are kernels that can be captured and that fix the order of sums."""
        return (
            isinstance(decoder.native, CudaLayers) and decoder.native.can_read(pool) and decoder.native.can_attend(pool)
        )

    def covers(self, chunks: ReadOnly[Chunk]) -> bool:
        """Whether these chunks are a decode step: the newest token of each sequence, and no token of a prompt to score."""
        return len(chunks) <= _MAX_ROWS and all(
            chunk.num_tokens == 1 and chunk.completes and not chunk.sequence.has_unscored_prompt for chunk in chunks
        )

    def launch(self, chunks: ReadOnly[Chunk], has_draws: bool = False) -> LaunchedDecode:
        """Begin to compute the chunks' tokens and to extend the cache by them; `has_draws` if some are to be drawn there."""
        sequences: list[Sequence] = []
        rows: list[DecodeRow] = []
        end = 0
        widths = by_width(chunks)
        alignment = row_alignment([len(members) for members in widths.values()])
        for width, members in widths.items():
            start = end + -end % alignment
            end = start + len(members)
            sequences += [chunk.sequence for chunk in members]
            rows += [DecodeRow(row, width) for row in range(start, end)]
        shape = StepShape(padded_rows(end), tuple(widths), _table_pages(sequences), has_draws)
        return self._captured(shape).launch(tuple(sequences), tuple(rows))

    def launch_after(self, step: LaunchedDecode) -> LaunchedDecode:
        """Begin the next step of the same sequences, whose tokens only the GPU may know yet."""
        shape = replace(step.shape, table_pages=_table_pages(step.sequences))
        return self._captured(shape).launch(step.sequences, step.rows, step.tokens)

    def _captured(self, shape: StepShape) -> "_CapturedStep":
        step = self._steps.pop(shape, None)
        if step is None:
            if len(self._steps) == _MAX_SHAPES:
                torch.cuda.synchronize()
                del self._steps[next(iter(self._steps))]
            step = _CapturedStep(shape, self._decoder, self._pool, self._memory, self._logits)
        self._steps[shape] = step
        return step


def padded_rows(count: int) -> int:
    """1, 2, 4, 8, 16, then multiples of 16: at most a few per cent of a step are spent on rows that nobody wants."""
    for size in (1, 2, 4, 8):
        if count <= size:
            return size
    return count + -count % 16


def row_alignment(counts: ReadOnly[int]) -> int:
    """Rows of a width begin at a multiple of this, for so many rows of each (`TileWidths`)."""
    few = sum(count + -count % TILE_TOKENS for count in counts) <= MIXED_ROWS
    return TILE_TOKENS if few else MIXED_ROWS


def padded_pages(count: int) -> int:
    pages = _FEWEST_PAGES
    while pages < count:
        pages *= _MORE_PAGES
    return pages


def _table_pages(sequences: Iterable[Sequence]) -> int:
    return padded_pages(max(len(sequence.pages) for sequence in sequences))


class _CapturedStep:
    """One graph, and the memory its inputs are written to.

    A step may be launched while the one before it runs, so what is copied from and to the host has two places.
    """

    def __init__(self, shape: StepShape, decoder: Decoder, pool: KVPool, memory: Any, logits: Tensor) -> None:
        """`memory` and `logits` [rows, vocab] are common to all graphs, of which one runs at a time."""
        self._shape = shape
        self._logits = logits[: shape.num_rows]
        rows, pages = shape.num_rows, shape.table_pages
        device = decoder.device
        self._scratch_page = pool.scratch_page
        size = (_ROW_FIELDS + pages) * rows + shape.num_tiles + (NUM_SETTINGS * rows if shape.has_draws else 0)
        self._hosts = cycle([torch.empty(size, dtype=torch.int64, pin_memory=True) for _ in range(2)])
        self._copies = cycle([torch.empty(rows, dtype=torch.int64, pin_memory=True) for _ in range(2)])
        self._inputs = torch.empty(size, dtype=torch.int64, device=device)
        self._fill((), (), 0)
        plan = self._plan(device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                self._compute(decoder, plan, pool)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            self._tokens = self._compute(decoder, plan, pool)

    def launch(
        self, sequences: tuple[Sequence, ...], rows: tuple[DecodeRow, ...], tokens: Tensor | None = None
    ) -> LaunchedDecode:
        """Compute each sequence's newest token, or the one after it, which `tokens` [padded rows] holds on the GPU.

        Of tokens that are not known there, what follows means nothing.
        """
        self._fill(sequences, rows, 0 if tokens is None else 1)
        if tokens is not None:
            torch.clamp(tokens, min=0, out=self._inputs[: self._shape.num_rows])
        self._graph.replay()
        copied = next(self._copies)
        copied.copy_(self._tokens, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return LaunchedDecode(sequences, rows, self._shape, self._logits, self._tokens, copied, done)

    def _fill(self, sequences: ReadOnly[Sequence], rows: ReadOnly[DecodeRow], ahead: int) -> None:
        """Write the inputs; what no sequence stands in is padding. `ahead` is the distance to tokens known here."""
        count, pages = self._shape.num_rows, self._shape.table_pages
        source = next(self._hosts)
        host = source.numpy()
        fields = host[: _ROW_FIELDS * count].reshape(_ROW_FIELDS, count)
        tables = host[_ROW_FIELDS * count : (_ROW_FIELDS + pages) * count].reshape(count, pages)
        tile_widths = host[(_ROW_FIELDS + pages) * count :][: self._shape.num_tiles]
        tile_widths[:] = NO_WIDTH
        fields[:] = 0
        fields[2] = self._scratch_page
        tables[:] = self._scratch_page
        for (row, width), sequence in zip(rows, sequences, strict=True):
            position = sequence.num_computed + ahead
            token = 0 if ahead else sequence.token_ids[position]
            page = sequence.pages[position // PAGE_SIZE]
            fields[:, row] = (token, position, page, position % PAGE_SIZE)
            tables[row, : len(sequence.pages)] = sequence.pages
            if self._shape.is_mixed:
                tile_widths[row // TILE_TOKENS] = width
        if self._shape.has_draws:
            settings = source[-NUM_SETTINGS * count :].view(torch.float64).view(NUM_SETTINGS, count)
            settings[:] = torch.tensor(NOT_DRAWN, dtype=torch.float64)[:, None]
            columns = [row for row, _ in rows]
            params = [sequence.request.sampling for sequence in sequences]
            settings[:, columns] = draw_settings(params, [sequence.num_generated + ahead for sequence in sequences])
        self._inputs.copy_(source, non_blocking=True)

    def _compute(self, decoder: Decoder, plan: BatchPlan, pool: KVPool) -> Tensor:
        """The tokens; what is kept of a graph's own memory is these alone."""
        self._logits.copy_(decoder.logits(decoder.forward(plan, pool)))
        likeliest = dispatch.greedy(self._logits)
        if not self._shape.has_draws:
            return likeliest
        settings = self._inputs[-NUM_SETTINGS * self._shape.num_rows :].view(torch.float64)
        return next_tokens(likeliest, self._logits, settings.view(NUM_SETTINGS, -1))

    def _plan(self, device: torch.device) -> BatchPlan:
        count, pages = self._shape.num_rows, self._shape.table_pages
        fields = self._inputs[: _ROW_FIELDS * count].view(_ROW_FIELDS, count)
        tables = self._inputs[_ROW_FIELDS * count : (_ROW_FIELDS + pages) * count].view(count, pages)
        widths = self._shape.widths
        tile_widths = TileWidths(widths, self._inputs[(_ROW_FIELDS + pages) * count :][: self._shape.num_tiles])
        row_ids = torch.arange(count, device=device)
        token_ids, positions, page_ids, page_offsets = fields
        return BatchPlan(
            token_ids=token_ids,
            positions=positions,
            page_ids=page_ids,
            page_offsets=page_offsets,
            segments=((widths[0], 0, count),),
            attention_groups=(AttentionGroup(row_ids[:, None], tables, positions[:, None]),),
            sampled_rows=row_ids,
            sampled=(),
            scored=(),
            tile_widths=tile_widths if self._shape.is_mixed else None,
        )
