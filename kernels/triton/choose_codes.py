"""The integer step of the solvers in one launch; `kernels.portable.choose_codes` says what it computes.

A program holds some rows. Errors of earlier columns stay in registers, and a column's target is formed when its turn
comes, as a dot product of those errors with its column of the coupling.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ROWS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _choose_codes_kernel(  # type: ignore[no-untyped-def]
    targets,  # [widths, rows, columns], changed
    origin,
    coupling,  # [widths, columns, columns]
    weights,  # [widths, columns]
    scale,  # [widths, rows]
    zero,
    shifts,  # int32 [widths]
    codes,  # [rows, columns]
    values,  # [widths, rows, columns]
    rows,
    HAS_ORIGIN: tl.constexpr,
    WIDTHS: tl.constexpr,
    WIDTHS_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    width = tl.arange(0, WIDTHS_PADDED)
    column_ids = tl.arange(0, COLUMNS)
    code_ids = tl.arange(0, CODES)
    used = (width[:, None] < WIDTHS) & (row[None, :] < rows)  # [widths, rows]
    part = width[:, None] * rows + row[None, :]
    shift = tl.load(shifts + width, mask=width < WIDTHS, other=0)
    scales = tl.load(scale + part, mask=used, other=0.0)
    zeros = tl.load(zero + part, mask=used, other=0.0)
    levels = (code_ids[None, None, :] >> shift[:, None, None]).to(tl.float32) * scales[:, :, None] + zeros[:, :, None]
    errors = tl.zeros([WIDTHS_PADDED, BLOCK_ROWS, COLUMNS], dtype=tl.float32)
    for column in range(COLUMNS):
        place = part * COLUMNS + column
        couples = tl.load(
            coupling + (width[:, None] * COLUMNS + column_ids[None, :]) * COLUMNS + column,
            mask=(width[:, None] < WIDTHS) & (column_ids[None, :] < column),
            other=0.0,
        )
        target = tl.load(targets + place, mask=used, other=0.0) + tl.sum(errors * couples[:, None, :], axis=2)
        weight = tl.load(weights + width * COLUMNS + column, mask=width < WIDTHS, other=0.0)
        difference = levels - target[:, :, None]
        cost = tl.sum(difference * difference * weight[:, None, None], axis=0)  # [rows, codes]
        chosen = tl.argmin(cost, axis=1)
        value = (chosen[None, :] >> shift[:, None]).to(tl.float32) * scales + zeros
        start = tl.load(origin + place, mask=used, other=0.0) if HAS_ORIGIN else target
        error = start - value
        errors = tl.where(column_ids[None, None, :] == column, error[:, :, None], errors)
        tl.store(targets + place, target, mask=used)
        tl.store(values + place, value, mask=used)
        tl.store(codes + row * COLUMNS + column, chosen.to(tl.uint8), mask=row < rows)


def choose_codes(
    targets: Tensor,
    origin: Tensor | None,
    coupling: Tensor,
    weights: Tensor,
    scale: Tensor,
    zero: Tensor,
    shifts: Sequence[int],
    num_codes: int,
) -> tuple[Tensor, Tensor]:
    num_widths, rows, columns = targets.shape
    working, values = targets.contiguous(), torch.empty(targets.shape, device=targets.device)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=targets.device)
    block_rows = _BLOCK_ROWS if num_codes <= 16 else 4
    _choose_codes_kernel[(triton.cdiv(rows, block_rows),)](
        working,
        working if origin is None else origin.contiguous(),
        coupling.contiguous(),
        weights.contiguous(),
        scale.contiguous(),
        zero.contiguous(),
        torch.tensor(shifts, dtype=torch.int32, device=targets.device),
        codes,
        values,
        rows,
        HAS_ORIGIN=origin is not None,
        WIDTHS=num_widths,
        WIDTHS_PADDED=triton.next_power_of_2(num_widths),
        COLUMNS=columns,
        CODES=num_codes,
        BLOCK_ROWS=block_rows,
    )
    if working is not targets:
        targets.copy_(working)
    return codes, values
