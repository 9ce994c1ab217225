"""Perplexity of a text, and how far each width is from the float model, computed through the served decoder."""

import importlib.resources
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anybit.engine.batch import Chunk, plan_batch
from anybit.engine.errors import SourceError
from anybit.engine.models.decoder import Decoder
from anybit.engine.precision import Precision
from anybit.engine.sequence import Sequence as TokenSequence
from anybit.engine.types import GenerationRequest, SamplingParams
from anybit.kvcache.pool import KVPool
from anybit.kvcache.spec import KVSpec

_CHUNK = 256
BUILTIN_TEXT = "alice_in_wonderland.txt"
"""Chapters I to III of Lewis Carroll's Alice's Adventures in Wonderland (1865), which is in the public domain."""


@dataclass(slots=True, eq=False)
class Variant:
    """One way of reading a model: a decoder at a width, with totals that grow as text is scored."""

    label: str
    decoder: Decoder
    bit_width: int
    kv_format: str
    effective_bits: float
    scheme: str = "nested"
    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    seconds: float = 0.0
    pool: KVPool | None = field(default=None, repr=False)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / max(self.tokens, 1), 700.0))


def builtin_text() -> str:
    return (importlib.resources.files("anybit.engine.quantize") / BUILTIN_TEXT).read_text()


def windows(
    token_ids: Sequence[int], context: int, max_tokens: int | None, first: Sequence[int] = ()
) -> list[list[int]]:
    """Whole windows of `context` tokens without overlap, from at most `max_tokens` tokens; SourceError if none fits.

    Each begins with `first`, the tokens that the model expects before every text.
    """
    limit = len(token_ids) if max_tokens is None else min(max_tokens, len(token_ids))
    step = context - len(first)
    if not 1 <= step <= limit:
        raise SourceError(f"The text has {limit} tokens, fewer than one window of {context}; use a shorter --context.")
    return [[*first, *token_ids[start : start + step]] for start in range(0, limit - step + 1, step)]


def evaluate(
    variants: Sequence[Variant],
    token_windows: Sequence[Sequence[int]],
    reference: Variant | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Score every window with every variant, filling in their totals.

    Each window starts afresh and predicts all but its first token. With a `reference` (one of the variants, or not),
    KL(reference ‖ variant) and top-1 agreement are summed over the same positions.
    """
    scored = list(variants) if reference is None or reference in variants else [reference, *variants]
    total = len(token_windows) * len(scored)
    done = 0
    for window in token_windows:
        sequences = {id(variant): start_sequence(window, variant) for variant in scored}
        for start in range(0, len(window), _CHUNK):
            count = min(_CHUNK, len(window) - start)
            targets = torch.tensor(window[start + 1 : start + count + 1], device=scored[0].decoder.device)
            expected = (
                next_log_probabilities(reference, sequences[id(reference)], count) if reference is not None else None
            )
            for variant in scored:
                if variant is reference and expected is not None:
                    log_probs = expected
                else:
                    log_probs = next_log_probabilities(variant, sequences[id(variant)], count)
                _accumulate(variant, log_probs[: len(targets)], targets, expected)
        done += len(scored)
        progress(done, total)
    for variant in scored:
        variant.pool = None


def next_log_probabilities(variant: Variant, sequence: TokenSequence, count: int) -> Tensor:
    """Log probabilities after each of the sequence's next `count` tokens: float32 [count, vocab]."""
    started = time.perf_counter()
    plan = plan_batch([Chunk(sequence, count)], variant.decoder.device)
    if variant.pool is None:
        raise ValueError("The sequence was not started with start_sequence.")
    log_probs = torch.log_softmax(variant.decoder.logits(variant.decoder.forward(plan, variant.pool)), -1)
    sequence.num_computed += count
    if log_probs.is_cuda:
        torch.cuda.synchronize()
    variant.seconds += time.perf_counter() - started
    return log_probs


def _accumulate(variant: Variant, log_probs: Tensor, targets: Tensor, expected: Tensor | None) -> None:
    variant.tokens += len(targets)
    variant.nll -= float(log_probs.gather(1, targets[:, None]).sum(dtype=torch.float64))
    if expected is not None:
        wanted = expected[: len(targets)]
        variant.kl += float((wanted.exp() * (wanted - log_probs)).sum(dtype=torch.float64))
        variant.agreements += int((wanted.argmax(-1) == log_probs.argmax(-1)).sum())


def start_sequence(window: Sequence[int], variant: Variant) -> TokenSequence:
    """A sequence of known tokens at the start of the variant's own, fresh cache."""
    variant.pool = _pool_for(variant, len(window))
    request = GenerationRequest("evaluate", list(window), SamplingParams(max_tokens=1), Precision(variant.bit_width))
    sequence = TokenSequence(request, arrived_at=0.0)
    sequence.pages = list(range(variant.pool.num_pages))
    return sequence


def _pool_for(variant: Variant, num_tokens: int) -> KVPool:
    config = variant.decoder.config
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, variant.kv_format)
    pages = spec.pages_for(num_tokens)
    if variant.pool is not None and variant.pool.num_pages == pages:
        return variant.pool
    return KVPool(spec, pages, variant.decoder.device)
