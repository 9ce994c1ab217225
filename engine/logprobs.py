"""Log probabilities of tokens, as the model gave them."""

from typing import Protocol

import torch
from torch import Tensor

from anybit.engine.types import TokenLogprob

# Logits of a large vocabulary take a megabyte a row: a long prompt is scored in pieces of this many rows.
_ROWS_AT_ONCE = 64


class LanguageModelHead(Protocol):
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [rows, hidden_size] to float32 logits [rows, vocab]."""
        ...


def score_rows(head: LanguageModelHead, hidden: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprob]:
    """Log probability of `token_ids[i]` after row i of hidden states [rows, hidden_size]; memory does not grow with rows."""
    scores = []
    for start in range(0, len(token_ids), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        scores += token_logprobs(head.logits(hidden[part]), token_ids[part], [num_top] * len(token_ids[part]))
    return scores


def token_logprobs(logits: Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprob]:
    """One entry per row of float32 logits [rows, vocab]: its token's log probability and those of the likeliest."""
    log_probabilities = torch.log_softmax(logits, -1)
    chosen = log_probabilities.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    # One sort order for all: a token's value is the same number in both places, as clients compare them for equality.
    values, ids = log_probabilities.topk(max(num_top), -1)
    return [
        TokenLogprob(token_id, logprob, list(zip(row_ids[:num], row_values[:num], strict=True)))
        for token_id, logprob, row_ids, row_values, num in zip(
            token_ids, chosen, ids.tolist(), values.tolist(), num_top, strict=True
        )
    ]
