"""The likeliest token."""

import torch
from torch import Tensor


def greedy(logits: Tensor) -> Tensor:
    """Per row the index of the largest logit, the first of equals, or −1 where one is not finite.

    [rows, vocab] -> int64 [rows].
    """
    return torch.where(torch.isfinite(logits).all(-1), logits.argmax(-1), -1)
