"""What a GPU prepares before requests wait for it: kernels are compiled, and likely decode steps captured.

Before it serves, the engine answers short prompts to nobody. Later, while it is idle, it captures one likely step at a time.
On a processor there is nothing to do.
"""

import logging
import time
from collections import deque

from anybit.engine.core import EngineCore
from anybit.engine.decode_graphs import MAX_ROWS, padded_pages, padded_rows
from anybit.engine.precision import Precision
from anybit.engine.step_inputs import StepShape
from anybit.engine.types import GenerationRequest, ModelInfo, SamplingParams
from anybit.kvcache.formats import is_exact
from anybit.kvcache.spec import PAGE_SIZE

logger = logging.getLogger("anybit.engine")

MOST_SHAPES = 56
"""Fewer than `DecodeGraphs` keeps: others, such as those of several widths, only show when they are needed."""
_USUAL_ROWS = 32
_PROMPT_TOKENS = (32, 64, 128, 512)
"""Products have kernels for about so many rows; beyond one page, sealed formats have something to seal and to read."""
_SHORT_PROMPT = 128
_NEW_TOKENS = 4


class WarmUp:
    """Prepares one core, in pieces."""

    def __init__(self, core: EngineCore, model: ModelInfo) -> None:
        self._core = core
        self._requests = first_requests(model) if core.captures_steps else []
        self._shapes = deque(likely_shapes(model) if core.captures_steps else ())
        self._num_captured = 0
        self._seconds = 0.0

    @property
    def has_more(self) -> bool:
        """Whether `capture_next` has something left to do."""
        return bool(self._shapes)

    def before_serving(self) -> None:
        """Answer prompts at each width: kernels are compiled, if no earlier start has, and steps of one row captured."""
        if not self._requests:
            return
        started = time.monotonic()
        core = self._core.apart()
        for request in self._requests:
            core.add(request)
            while core.has_work:
                core.step()
        core.check_integrity()
        logger.info("Warmed up in %.1f s.", time.monotonic() - started)

    def capture_next(self) -> None:
        """Capture the likeliest step that has not been yet. Only while the core has no work."""
        if not self._shapes:
            return
        started = time.monotonic()
        while self._shapes:
            if self._capture(self._shapes.popleft()):
                self._num_captured += 1
                break
        self._seconds += time.monotonic() - started
        if not self._shapes:
            logger.info("Captured %d likely decode steps in %.1f s.", self._num_captured, self._seconds)

    def _capture(self, shape: StepShape) -> bool:
        try:
            return self._core.capture(shape)
        except Exception:
            logger.exception("A likely decode step was not captured; it and others will be when requests need them.")
            self._shapes.clear()
            return False


def first_requests(model: ModelInfo) -> list[GenerationRequest]:
    """Prompts of several lengths at the default width, and one at each other; one answer is drawn."""
    default, *others = _default_first(model)
    longest = model.max_model_len - _NEW_TOKENS
    lengths = sorted({min(length, longest) for length in _PROMPT_TOKENS if longest > 0})
    asked = [(default, length, 0.0) for length in lengths]
    if lengths:
        asked += [(default, lengths[0], 1.0)]
        asked += [(width, min(_SHORT_PROMPT, longest), 0.0) for width in others]
    return [
        GenerationRequest(
            f"warm-up-{index}",
            [token % model.vocab_size for token in range(length)],
            SamplingParams(_NEW_TOKENS, temperature),
            Precision(width),
        )
        for index, (width, length, temperature) in enumerate(asked)
    ]


def likely_shapes(model: ModelInfo) -> list[StepShape]:
    """At most MOST_SHAPES decode steps of one width and the default format, the likeliest first.

    A longer table, twice the usual rows or another width than the default (which counts twice) make a step less likely.
    """
    found: list[tuple[tuple[int, ...], StepShape]] = []
    for width_rank, width in enumerate(_default_first(model)):
        for table_rank, pages in enumerate(_table_sizes(model)):
            for num_rows in _row_counts(model.max_num_seqs):
                rarity = 2 * (width_rank > 0) + table_rank + (-(-num_rows // _USUAL_ROWS) - 1).bit_length()
                for has_draws in (False, True):
                    shape = StepShape(num_rows, (width,), pages, has_draws, (model.kv_format,))
                    found.append(((rarity, num_rows, table_rank, width_rank), shape))
    found.sort(key=lambda ranked: ranked[0])
    return [shape for _, shape in found[:MOST_SHAPES]]


def _default_first(model: ModelInfo) -> list[int]:
    return sorted(model.bit_widths, key=lambda width: width != model.default_bit_width)


def _row_counts(max_num_seqs: int) -> list[int]:
    """1, 2, 4, ... and what all sequences need."""
    most = padded_rows(min(max_num_seqs, MAX_ROWS))
    counts = [1]
    while counts[-1] < most:
        counts.append(min(2 * counts[-1], most))
    return counts


def _table_sizes(model: ModelInfo) -> list[int]:
    num_pages = -(-model.max_model_len // PAGE_SIZE) + (not is_exact(model.kv_format))
    sizes = [padded_pages(1)]
    while sizes[-1] < num_pages:
        sizes.append(padded_pages(sizes[-1] + 1))
    return sizes
