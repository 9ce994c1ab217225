"""The integer step of the solvers: codes of a block of columns, chosen one column after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    """Per column j the code that minimises Σ_r weights_rj (targets_rj − level_r)².

    Width r reads the level scale_r·(code >> shift_r) + zero_r. The columns go from left to right; after column j,
    targets_rk += (origin_rj − level_rj)·coupling_rjk for all k > j, with `origin` None meaning the targets.

    float32: targets and origin [widths, out, columns], targets changed in place; coupling [widths, columns, columns];
    weights [widths, columns]; scale and zero [widths, out]. Returns the codes, uint8 [out, columns], and their levels,
    shaped like targets.
    """
    num_widths, rows, columns = targets.shape
    all_codes = torch.arange(num_codes, device=targets.device)
    levels = torch.stack([(all_codes >> shift).to(targets.dtype) for shift in shifts])
    levels = levels[:, None, :] * scale[:, :, None] + zero[:, :, None]  # [widths, out, codes]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=targets.device)
    values = torch.empty_like(targets)
    for column in range(columns):
        target = targets[:, :, column]
        cost = (levels - target[:, :, None]).square_().mul_(weights[:, column, None, None]).sum(0)
        chosen = cost.argmin(1)
        codes[:, column] = chosen
        value = levels.gather(2, chosen.expand(num_widths, rows)[:, :, None])[:, :, 0]
        values[:, :, column] = value
        passed_on = (target if origin is None else origin[:, :, column]) - value
        targets[:, :, column + 1 :] += passed_on[:, :, None] * coupling[:, None, column, column + 1 :]
    return codes, values
