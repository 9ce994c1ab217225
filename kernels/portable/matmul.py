"""Batched float products whose rows do not depend on their neighbours (ARCHITECTURE, "Same answer").

BLAS libraries pick another summation order for very few rows than for many. Padding the rows to a multiple of
ROW_MULTIPLE keeps the common ones on one order; whether that holds for a shape on this machine is tested once, on
random numbers, before the shape is first used. Where it does not hold, each row is computed in a block of its own:
slower, and counted as a fallback, but the same bits in any company.
"""

import functools

import torch
from torch import Tensor

from anybit.kernels import fallbacks

ROW_MULTIPLE = 8
_PROBED_ROWS = (8, 16, 40, 104, 256)
_PROBED_BATCHES = (1, 2, 7)


def batched_matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with each row of the result a function of its own row of `left` and its own `right` alone.

    left [batch, rows, inner] with rows a multiple of ROW_MULTIPLE; right [batch, inner, columns];
    returns [batch, rows, columns]. On a GPU nothing is promised about rows: engines there say that they are not
    reproducible.
    """
    inner, columns = right.shape[1:]
    transposed = right.stride(1) < right.stride(2)
    if right.is_cuda or _rows_are_independent(
        inner, columns, transposed, right.dtype, right.device, torch.get_num_threads()
    ):
        return torch.bmm(left, right)
    fallbacks.record("batched_matmul", "rows depend on the batch in this BLAS, so each is computed alone")
    out = torch.empty(*left.shape[:2], columns, dtype=left.dtype, device=left.device)
    block = torch.zeros(1, ROW_MULTIPLE, inner, dtype=left.dtype, device=left.device)
    for index in range(left.shape[0]):
        for row in range(left.shape[1]):
            block[0, 0] = left[index, row]
            out[index, row] = torch.bmm(block, right[index : index + 1])[0, 0]
    return out


@functools.cache
def _rows_are_independent(
    inner: int, columns: int, transposed: bool, dtype: torch.dtype, device: torch.device, num_threads: int
) -> bool:
    """Whether this BLAS gives a row the same bits at any position, in any padded number of rows, in any batch."""
    del num_threads  # part of the key only: the split of the work depends on it
    generator = torch.Generator().manual_seed(inner)
    rows, batch = max(_PROBED_ROWS), max(_PROBED_BATCHES)
    left = torch.randn(batch, rows, inner, generator=generator).to(device, dtype)
    shape = (batch, columns, inner) if transposed else (batch, inner, columns)
    right = torch.randn(shape, generator=generator).to(device, dtype)
    right = right.transpose(1, 2) if transposed else right
    expected = torch.bmm(left, right)
    rolled = left.roll(3, 1)
    return all(
        torch.equal(torch.bmm(left[:b, :r], right[:b]), expected[:b, :r])
        and torch.equal(torch.bmm(left[-b:, -r:], right[-b:]), expected[-b:, -r:])
        and torch.equal(torch.bmm(rolled[:b, :r], right[:b])[:, 3:], expected[:b, : r - 3])
        for r in _PROBED_ROWS
        for b in _PROBED_BATCHES
    )
