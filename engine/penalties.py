"""Changes that a request asks for in its own logits, before the next token is chosen."""

from collections.abc import Sequence as ReadOnly

import torch
from torch import Tensor

from anybit.engine.sequence import Sequence
from anybit.engine.types import SamplingParams


def adjust_logits(logits: Tensor, sequences: ReadOnly[Sequence]) -> bool:
    """Apply each sequence's penalties and biases to its row of float32 logits [sequences, vocab], in place.

    Returns whether any had some.
    """
    changing = [row for row, sequence in enumerate(sequences) if changes_logits(sequence.request.sampling)]
    for row in changing:
        _adjust(logits[row], sequences[row])
    return bool(changing)


def changes_logits(params: SamplingParams) -> bool:
    """Whether a request asks for changes in its logits."""
    return bool(
        params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty or params.logit_bias
    )


def _adjust(row: Tensor, sequence: Sequence) -> None:
    params, start = sequence.request.sampling, sequence.num_prompt_tokens
    if params.repetition_penalty != 1:
        # Sign-aware form of arXiv 1909.05858, section 4.1: a seen token always becomes less likely for penalties above 1.
        seen = _tensor(sorted(set(sequence.token_ids)), row)
        logits = row[seen]
        row[seen] = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = torch.bincount(_tensor(sequence.token_ids[start:], row), minlength=row.numel())
        row -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    if params.logit_bias:
        biases = torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
        row[_tensor(list(params.logit_bias), row)] += biases


def _tensor(token_ids: list[int], row: Tensor) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=row.device)
