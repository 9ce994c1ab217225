"""Log probabilities of the choices of multiple-choice questions, computed through the served decoder."""

from collections.abc import Callable, Sequence

import torch

from anybit.engine.evaluate.questions import TokenQuestion
from anybit.engine.evaluate.variant import Variant, branch_sequence, next_log_probabilities, start_sequence
from anybit.engine.sequence import Sequence as TokenSequence

_CHUNK = 256


def score_questions(
    variants: Sequence[Variant],
    questions: Sequence[TokenQuestion],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[list[float]]]:
    """By variant, question and choice: the sum of the log probabilities of the choice's tokens after the context."""
    scores: list[list[list[float]]] = [[] for _ in variants]
    # Room for the longest from the start, so that the cache is made once.
    longest = max((question.num_tokens for question in questions), default=0)
    for number, question in enumerate(questions):
        for variant, scored in zip(variants, scores, strict=True):
            scored.append(_score(variant, question, longest - len(question.context)))
        progress((number + 1) * len(variants), len(questions) * len(variants))
    for variant in variants:
        variant.pool = None
    return scores


def _score(variant: Variant, question: TokenQuestion, room: int) -> list[float]:
    """The context is computed once; each choice continues it in turn."""
    sequence = start_sequence(question.context, variant, room)
    while sequence.num_pending > 0:
        after_context = next_log_probabilities(variant, sequence, min(_CHUNK, sequence.num_pending), last=1)
    firsts = after_context[0].tolist()
    return [
        firsts[choice[0]] + _sum_of_rest(variant, branch_sequence(sequence, choice[:-1]), choice[1:])
        for choice in question.choices
    ]


def _sum_of_rest(variant: Variant, branch: TokenSequence, targets: Sequence[int]) -> float:
    """The sum of what each token of the branch gives to the target after it."""
    total = 0.0
    for start in range(0, len(targets), _CHUNK):
        part = torch.tensor(targets[start : start + _CHUNK], device=variant.decoder.device)
        after = next_log_probabilities(variant, branch, len(part))
        total += sum(after.gather(1, part[:, None])[:, 0].tolist())
    return total
