"""The integer step: columns in order, each code the best for all widths together, the error passed on to later columns.

GPTQ (arXiv 2210.17323) and coordinate descent differ only in what a column's error does to the targets of the columns
after it, so both are the same walk over columns with another coupling (`kernels.dispatch.choose_codes`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from anybit.engine.quantize.solve.affine import refit_group
from anybit.engine.quantize.solve.problem import NestedProblem, NestedSolution, multiply
from anybit.engine.quantize.solve.side_by_side import each_part
from anybit.kernels.dispatch import choose_codes

_LARGEST_BLOCK = 64
_TOGETHER = int(__import__("os").environ.get("TG", 1 << 20))  # weights of all widths
_FEWEST_ROWS = 64


def gptq_pass(problem: NestedProblem, solution: NestedSolution) -> None:
    """Replace the codes by GPTQ's for the solution's float parts; every width keeps error feedback of its own.

    With one width this is GPTQ with a fixed grid (static groups): e_i = (w_i − ŵ_i)/U_ii, w_k −= e_i U_ik.
    """
    factors = problem.factor_stack
    each_part(problem, lambda rows: _gptq_rows(problem.of_rows(rows), solution.of_rows(rows), factors))


def _gptq_rows(problem: NestedProblem, solution: NestedSolution, factors: Tensor) -> None:
    targets = problem.targets.clone()
    pivots = factors.diagonal(dim1=1, dim2=2)  # [widths, in]
    importance = _importance(problem)
    for group, block in _blocks(problem):
        factor, pivot = factors[:, block, block], pivots[:, block]
        rounded = targets[:, :, block].contiguous()
        codes, values = choose_codes(
            rounded,
            None,
            -factor / pivot[:, :, None],
            importance / pivot.square(),
            solution.scale[:, :, group],
            solution.zero[:, :, group],
            problem.shifts,
            1 << problem.code_bits,
        )
        solution.codes[:, block] = codes
        # choose_codes left in `rounded` what each column was rounded from.
        error = (rounded - values) / pivot[:, None]
        targets[:, :, block.stop :] -= multiply(error, factors[:, block, block.stop :])


def descent_pass(problem: NestedProblem, solution: NestedSolution, refit: bool = True) -> None:
    """One pass of coordinate descent over all codes and, with `refit`, over the float parts group by group.

    Each step minimises the weighted loss exactly over one column's codes (or one group's s and z per width) with all
    else fixed, so the loss never rises.
    """
    hessians = problem.hessian_stack
    each_part(problem, lambda rows: _descend_rows(problem.of_rows(rows), solution.of_rows(rows), hessians, refit))


def _descend_rows(problem: NestedProblem, solution: NestedSolution, hessians: Tensor, refit: bool) -> None:
    importance = _importance(problem)
    error = problem.targets - solution.read(problem)
    for group, block in _blocks(problem):
        hessian = hessians[:, block, block]
        diagonal = hessian.diagonal(dim1=1, dim2=2)  # [widths, block]
        gradient = multiply(error, hessians[:, :, block])
        before = problem.targets[:, :, block] - error[:, :, block]
        codes, values = choose_codes(
            before + gradient / diagonal[:, None],
            before,
            hessian / diagonal[:, None],
            importance * diagonal,
            solution.scale[:, :, group],
            solution.zero[:, :, group],
            problem.shifts,
            1 << problem.code_bits,
        )
        solution.codes[:, block] = codes
        if refit and block.stop - block.start == problem.group_size:
            gradient -= multiply(values - before, hessian)
            values = refit_group(problem, solution, group, values, gradient, hessian)
        error[:, :, block] = problem.targets[:, :, block] - values


def _blocks(problem: NestedProblem) -> Iterator[tuple[int, slice]]:
    """Blocks of columns that lie in one group, with that group's index."""
    size = problem.group_size if problem.group_size <= 2 * _LARGEST_BLOCK else _LARGEST_BLOCK
    for start in range(0, problem.targets.shape[2], size):
        yield start // problem.group_size, slice(start, start + size)


def _importance(problem: NestedProblem) -> Tensor:
    return torch.tensor(problem.importance, device=problem.targets.device)[:, None]
