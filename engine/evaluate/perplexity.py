"""Perplexity of a text, and how far each width is from the float model, computed through the served decoder."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anybit.engine.evaluate.variant import Variant, next_log_probabilities, start_sequence

_CHUNK = 256


def score_windows(
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


def _accumulate(variant: Variant, log_probs: Tensor, targets: Tensor, expected: Tensor | None) -> None:
    variant.tokens += len(targets)
    variant.nll -= float(log_probs.gather(1, targets[:, None]).sum(dtype=torch.float64))
    if expected is not None:
        wanted = expected[: len(targets)]
        variant.kl += float((wanted.exp() * (wanted - log_probs)).sum(dtype=torch.float64))
        variant.agreements += int((wanted.argmax(-1) == log_probs.argmax(-1)).sum())
