"""The likeliest token on an NVIDIA GPU."""

import torch
from torch import Tensor

from anybit.kernels.cuda.driver import can_launch, integers, load_kernel, pointers

_THREADS = 256
_COLUMNS_OF_THREAD = 8


def can_choose(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype == torch.float32 and logits.numel() > 0 and can_launch(logits.device)


def greedy(logits: Tensor) -> Tensor:
    """As `portable.greedy.greedy`, for what `can_choose` admits."""
    logits = logits.contiguous()
    rows, columns = logits.shape
    pieces = -(-columns // (_THREADS * _COLUMNS_OF_THREAD))
    of_pieces = torch.empty(rows, pieces, 2, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    load_kernel("greedy", "greedy_pieces", ()).launch(
        (pieces, rows, 1), _THREADS, [*pointers(logits, of_pieces), *integers(columns)]
    )
    load_kernel("greedy", "greedy_rows", ()).launch(
        (rows, 1, 1), _THREADS, [*pointers(of_pieces, tokens), *integers(pieces)]
    )
    return tokens
