"""Steps of one token a sequence on a GPU, captured as CUDA graphs: a step is one launch, whatever the number of layers.

A graph's shape is a padded number of rows for each bit-width and a padded number of pages; it is captured when a step first
needs it. Rows that pad write to the pool's scratch page. All graphs read the same weights and pages, so a new width or batch
size moves nothing.
"""

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from anybit.engine.batch import AttentionGroup, BatchPlan, Chunk
from anybit.engine.models.cuda_layers import CudaLayers
from anybit.engine.models.decoder import Decoder
from anybit.engine.sequence import Sequence
from anybit.kernels import dispatch
from anybit.kernels.dispatch import WidthSegment
from anybit.kvcache.pool import KVPool
from anybit.kvcache.spec import PAGE_SIZE

_MAX_ROWS = 256
_FEWEST_PAGES, _MORE_PAGES = 8, 4  # tables have 8, 32, 128, ... pages
_ROW_FIELDS = 4  # token, position, page, offset
_WARM_UP_RUNS = 2  # kernels are compiled and loaded before the capture


@dataclass(frozen=True, slots=True)
class StepShape:
    """Rows of each width, in order, and pages of a block table."""

    rows: tuple[tuple[int, int], ...]  # (bit_width, padded rows)
    table_pages: int

    @property
    def num_rows(self) -> int:
        return sum(count for _, count in self.rows)

    @property
    def segments(self) -> tuple[WidthSegment, ...]:
        segments, start = [], 0
        for width, count in self.rows:
            segments.append((width, start, start + count))
            start += count
        return tuple(segments)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Logits float32 [sequences, vocab] and per sequence the likeliest token, or −1 where a logit is not finite."""

    sequences: tuple[Sequence, ...]
    logits: Tensor
    likeliest: list[int]
    widths: frozenset[int]


class DecodeGraphs:
    """Captures and replays the decode steps of one decoder over one pool."""

    def __init__(self, decoder: Decoder, pool: KVPool) -> None:
        self._decoder = decoder
        self._pool = pool
        self._memory = torch.cuda.graph_pool_handle()
        self._steps: dict[StepShape, _CapturedStep] = {}

    @staticmethod
    def can_serve(decoder: Decoder) -> bool:
        """Whether all of the decoder's layers can be captured."""
        return isinstance(decoder.native, CudaLayers)

    def covers(self, chunks: ReadOnly[Chunk]) -> bool:
        """Whether these chunks are a decode step: the newest token of each sequence, and no token of a prompt to score."""
        return len(chunks) <= _MAX_ROWS and all(
            chunk.num_tokens == 1 and chunk.completes and not chunk.sequence.has_unscored_prompt for chunk in chunks
        )

    def run(self, chunks: ReadOnly[Chunk]) -> StepResult:
        """Compute the chunks' tokens and extend the cache by them. The logits are overwritten by the next call."""
        by_width = {
            width: [chunk.sequence for chunk in equals]
            for width, equals in groupby(sorted(chunks, key=_bit_width), key=_bit_width)
        }
        longest = max(len(chunk.sequence.pages) for chunk in chunks)
        shape = StepShape(
            tuple((width, padded_rows(len(sequences))) for width, sequences in by_width.items()), padded_pages(longest)
        )
        step = self._steps.get(shape)
        if step is None:
            step = self._steps[shape] = _CapturedStep(shape, self._decoder, self._pool, self._memory)
        rows: list[int] = []
        for (_, start, _), members in zip(shape.segments, by_width.values(), strict=True):
            rows += range(start, start + len(members))
        sequences = tuple(sequence for members in by_width.values() for sequence in members)
        logits, likeliest = step.replay(sequences, rows)
        return StepResult(sequences, logits, likeliest, frozenset(by_width))


def padded_rows(count: int) -> int:
    """1, 2, 4, 8, 16, then multiples of 16: at most a few per cent of a step are spent on rows that nobody wants."""
    for size in (1, 2, 4, 8):
        if count <= size:
            return size
    return count + -count % 16


def padded_pages(count: int) -> int:
    pages = _FEWEST_PAGES
    while pages < count:
        pages *= _MORE_PAGES
    return pages


def _bit_width(chunk: Chunk) -> int:
    return chunk.sequence.bit_width


class _CapturedStep:
    """One graph, and the memory its inputs are written to."""

    def __init__(self, shape: StepShape, decoder: Decoder, pool: KVPool, memory: Any) -> None:
        self._shape = shape
        rows, pages = shape.num_rows, shape.table_pages
        device = decoder.device
        self._scratch_page = pool.scratch_page
        self._host = torch.empty((_ROW_FIELDS + pages) * rows, dtype=torch.int64, pin_memory=True)
        self._inputs = torch.empty_like(self._host, device=device)
        self._fill((), ())
        plan = self._plan(device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                _compute(decoder, plan, pool)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            self._logits, self._likeliest = _compute(decoder, plan, pool)

    def replay(self, sequences: ReadOnly[Sequence], rows: list[int]) -> tuple[Tensor, list[int]]:
        """Logits and likeliest tokens of `sequences`, which stand in these rows; waits for the result."""
        self._fill(sequences, rows)
        self._graph.replay()
        likeliest = self._likeliest.tolist()
        in_order = rows == list(range(len(rows)))
        logits = self._logits[: len(rows)] if in_order else self._logits[rows]
        return logits, [likeliest[row] for row in rows]

    def _fill(self, sequences: ReadOnly[Sequence], rows: ReadOnly[int]) -> None:
        """Write the inputs; what no sequence stands in is padding."""
        count, pages = self._shape.num_rows, self._shape.table_pages
        host = self._host.numpy()
        fields, tables = host[: _ROW_FIELDS * count].reshape(_ROW_FIELDS, count), host[_ROW_FIELDS * count :]
        tables = tables.reshape(count, pages)
        fields[:] = 0
        fields[2] = self._scratch_page
        tables[:] = self._scratch_page
        for row, sequence in zip(rows, sequences, strict=True):
            position = sequence.num_computed
            page = sequence.pages[position // PAGE_SIZE]
            fields[:, row] = (sequence.token_ids[position], position, page, position % PAGE_SIZE)
            tables[row, : len(sequence.pages)] = sequence.pages
        self._inputs.copy_(self._host, non_blocking=True)

    def _plan(self, device: torch.device) -> BatchPlan:
        count, pages = self._shape.num_rows, self._shape.table_pages
        fields = self._inputs[: _ROW_FIELDS * count].view(_ROW_FIELDS, count)
        tables = self._inputs[_ROW_FIELDS * count :].view(count, pages)
        row_ids = torch.arange(count, device=device)
        token_ids, positions, page_ids, page_offsets = fields
        return BatchPlan(
            token_ids=token_ids,
            positions=positions,
            page_ids=page_ids,
            page_offsets=page_offsets,
            segments=self._shape.segments,
            attention_groups=(AttentionGroup(row_ids[:, None], tables, positions[:, None]),),
            sampled_rows=row_ids,
            sampled=(),
            scored=(),
        )


def _compute(decoder: Decoder, plan: BatchPlan, pool: KVPool) -> tuple[Tensor, Tensor]:
    logits = decoder.logits(decoder.forward(plan, pool))
    return logits, dispatch.greedy(logits)
