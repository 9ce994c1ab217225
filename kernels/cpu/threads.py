"""PyTorch's threads beside the native ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from anybit.kernels.cpu.bindings import get_threads, set_threads


@contextmanager
def torch_on_all_threads() -> Iterator[None]:
    """Until the block ends PyTorch computes with as many threads as the native kernels do."""
    before = torch.get_num_threads()
    torch.set_num_threads(get_threads() or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Until the block ends PyTorch and the native kernels compute on the caller's thread alone; results stay the same."""
    before, native_before = torch.get_num_threads(), get_threads()
    torch.set_num_threads(1)
    set_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        set_threads(native_before or before)
