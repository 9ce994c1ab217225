"""Steps of one token a sequence on a GPU, captured as CUDA graphs: a step is one launch, whatever the number of layers.

A graph's shape is a padded number of rows, the sets of their bit-widths and KV formats and a padded number of pages; it is
captured when a step first needs it, or before (`engine.warm_up`). Where widths or formats meet, which rows have which is an
input. Rows that pad write to the pool's scratch page. All graphs read the same weights and pages, so a new width or batch
size moves nothing. Pages that a step has filled are sealed behind its graph.
"""

from collections.abc import Iterable
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from anybit.engine.batch import BatchPlan
from anybit.engine.chunk import Chunk, by_width
from anybit.engine.kv.sealed_batch import seals_of
from anybit.engine.models.cuda_layers import CudaLayers
from anybit.engine.models.decoder import Decoder
from anybit.engine.sampling import FoundTokens, next_tokens
from anybit.engine.sequence import Sequence
from anybit.engine.step_inputs import DecodeRow, StepInputs, StepShape
from anybit.kernels import dispatch
from anybit.kernels.layout import BIT_WIDTHS
from anybit.kernels.widths import MIXED_ROWS
from anybit.kvcache.pool import KVPool

MAX_ROWS = 256
_FEWEST_PAGES, _MORE_PAGES = 8, 4  # tables have 8, 32, 128, ... pages
MAX_SHAPES = 64
_SPARE_MEMORY = 0.05  # share of a GPU's memory that captures ahead of time leave free
_WARM_UP_RUNS = 2  # kernels are compiled and loaded before the capture


@dataclass(frozen=True, slots=True)
class StepResult:
    """Logits float32 [sequences, vocab], and what the step itself has made of them."""

    logits: Tensor
    found: FoundTokens


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
        """`can_serve` has said so."""
        assert isinstance(decoder.native, CudaLayers)
        self._layers = decoder.native
        self._decoder = decoder
        self._pool = pool
        self._memory = torch.cuda.graph_pool_handle()
        most_rows = padded_rows(MAX_ROWS + MIXED_ROWS * len(BIT_WIDTHS))
        self._logits = torch.empty(most_rows, decoder.config.vocab_size, device=decoder.device)
        self._steps: dict[StepShape, _CapturedStep] = {}  # the least recently used first

    @staticmethod
    def can_serve(decoder: Decoder, pool: KVPool) -> bool:
        """Whether all layers, over these pages, are kernels that can be captured and that fix the order of sums."""
        return isinstance(decoder.native, CudaLayers) and decoder.native.can_attend(pool)

    def covers(self, chunks: ReadOnly[Chunk]) -> bool:
        """Whether these chunks are a decode step: the newest token of each sequence, and no token of a prompt to score."""
        return len(chunks) <= MAX_ROWS and all(
            chunk.num_tokens == 1 and chunk.completes and not chunk.sequence.has_unscored_prompt for chunk in chunks
        )

    def launch(self, chunks: ReadOnly[Chunk], has_draws: bool = False) -> LaunchedDecode:
        """Begin to compute the chunks' tokens and to extend the cache by them; `has_draws` if some are to be drawn there."""
        sequences: list[Sequence] = []
        rows: list[DecodeRow] = []
        end = 0
        widths = by_width(chunks)
        alignment = self._layers.row_alignment([len(members) for members in widths.values()])
        for width, members in widths.items():
            start = end + -end % alignment
            end = start + len(members)
            sequences += [chunk.sequence for chunk in members]
            rows += [DecodeRow(row, width) for row in range(start, end)]
        kv_formats = tuple(sorted({sequence.kv_format for sequence in sequences}))
        shape = StepShape(padded_rows(end), tuple(widths), _table_pages(sequences), has_draws, kv_formats)
        return self._captured(shape).launch(tuple(sequences), tuple(rows))

    def launch_after(self, step: LaunchedDecode) -> LaunchedDecode:
        """Begin the next step of the same sequences, whose tokens only the GPU may know yet."""
        shape = replace(step.shape, table_pages=_table_pages(step.sequences))
        return self._captured(shape).launch(step.sequences, step.rows, step.tokens)

    def capture(self, shape: StepShape) -> bool:
        """Capture a shape that no step needs yet, if it is not there and there is room for it; whether that was done.

        It is forgotten before all that steps did need. No sequence's pages are read or written, but logits that a step has
        left are overwritten.
        """
        if shape in self._steps or len(self._steps) >= MAX_SHAPES or not self._has_memory():
            return False
        step = _CapturedStep(shape, self._decoder, self._pool, self._memory, self._logits)
        self._steps = {shape: step, **self._steps}
        return True

    def compile_mixed(self, widths: tuple[int, ...], num_rows: int) -> None:
        """Compile what a step of these widths needs, from any thread."""
        self._layers.compile_mixed(widths, num_rows)

    def _has_memory(self) -> bool:
        torch.cuda.empty_cache()  # as a capture does
        free, total = torch.cuda.mem_get_info(self._decoder.device)
        return free >= total * _SPARE_MEMORY

    def _captured(self, shape: StepShape) -> "_CapturedStep":
        step = self._steps.pop(shape, None)
        if step is None:
            if len(self._steps) == MAX_SHAPES:
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


def padded_pages(count: int) -> int:
    pages = _FEWEST_PAGES
    while pages < count:
        pages *= _MORE_PAGES
    return pages


def _table_pages(sequences: Iterable[Sequence]) -> int:
    return padded_pages(max(len(sequence.pages) for sequence in sequences))


class _CapturedStep:
    """One graph, and the memory its inputs are written to.

    A step may be launched while the one before it runs, so what is copied to the host has two places.
    """

    def __init__(self, shape: StepShape, decoder: Decoder, pool: KVPool, memory: Any, logits: Tensor) -> None:
        """`memory` and `logits` [rows, vocab] are common to all graphs, of which one runs at a time."""
        self._shape = shape
        self._pool = pool
        self._logits = logits[: shape.num_rows]
        device = decoder.device
        self._copies = cycle([torch.empty(shape.num_rows, dtype=torch.int64, pin_memory=True) for _ in range(2)])
        self._inputs = StepInputs(shape, pool.scratch_page, device)
        plan = self._inputs.plan()
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
        ahead = 0 if tokens is None else 1
        self._inputs.fill(sequences, rows, ahead)
        if tokens is not None:
            torch.clamp(tokens, min=0, out=self._inputs.token_ids)
        self._graph.replay()
        copied = next(self._copies)
        copied.copy_(self._tokens, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._seal(sequences, ahead)  # the tokens do not wait for it, the next step does
        return LaunchedDecode(sequences, rows, self._shape, self._logits, self._tokens, copied, done)

    def _seal(self, sequences: ReadOnly[Sequence], ahead: int) -> None:
        """Encode the pages that the step has filled."""
        for name in self._shape.sealed_formats:
            of_format = [sequence for sequence in sequences if sequence.kv_format == name]
            written = [(sequence, sequence.num_computed + ahead, 1) for sequence in of_format]
            seals = seals_of(written, self._logits.device)
            if seals is not None:
                self._pool.seal(name, seals)

    def _compute(self, decoder: Decoder, plan: BatchPlan, pool: KVPool) -> Tensor:
        """The tokens; what is kept of a graph's own memory is these alone."""
        self._logits.copy_(decoder.logits(decoder.forward(plan, pool)))
        likeliest = dispatch.greedy(self._logits)
        if not self._shape.has_draws:
            return likeliest
        return next_tokens(likeliest, self._logits, self._inputs.draws)
