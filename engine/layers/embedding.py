"""Token embeddings and the head that turns hidden states into logits."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.kernels import dispatch
from anybit.kernels.dispatch import ServedWeight


class VocabularyTable(Protocol):
    """A [vocab, hidden] matrix used as embedding (rows by token id), as LM head, or, when tied, as both."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [tokens] -> float32 [tokens, hidden]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, vocab]."""
        ...


@dataclass(frozen=True, slots=True)
class NestedVocabulary:
    """Read at one fixed bit-width whatever the width of a request's linears (FORMATS, section 1)."""

    weight: ServedWeight
    bit_width: int

    def embed(self, token_ids: Tensor) -> Tensor:
        return dispatch.embedding(token_ids, self.weight, self.bit_width)

    def logits(self, hidden: Tensor) -> Tensor:
        return dispatch.linear(hidden, self.weight, [(self.bit_width, 0, hidden.shape[0])])


@dataclass(frozen=True, slots=True)
class DenseVocabulary:
    """Unquantized; for evaluation and tests."""

    weight: Tensor

    def embed(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight).to(torch.float32)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.weight.dtype), self.weight)
