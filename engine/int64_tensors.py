"""Lists of integers as tensors on a device."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor


def int64_tensors(lists: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, ...]:
    """Views of one tensor, as making many small ones would take longer than a layer; a GPU is not waited for."""
    flat = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64)
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    return torch.split(flat, [len(values) for values in lists])
