"""The float step: scales and zeros for given codes, and the grids that codes are first rounded to."""

import torch
from torch import Tensor

from anybit.engine.quantize.solve.problem import NestedProblem, NestedSolution, proxy_loss
from anybit.engine.quantize.solve.side_by_side import each_part

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
_SINGULAR = 1e-6  # of the trace: below it a group's codes are taken to be all equal


def initial_solution(problem: NestedProblem, clip_ratios: tuple[float, ...] = CLIP_RATIOS) -> NestedSolution:
    """Round to nearest on the min-max grid of each row and group, shrunk about its middle by the best clip ratio.

    The ratio minimises Σ_r importance_r Σ_i H_r,ii (T_r − Ŵ_r)² of its group, and what the remainder's range will cost
    where a problem says that it matters. A width's levels are the middles of the ranges of the codes that it does not
    tell apart.
    """
    parts = each_part(problem, lambda rows: _initial_rows(problem.of_rows(rows), clip_ratios))
    return NestedSolution(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts], dim=1),
        torch.cat([part.zero for part in parts], dim=1),
    )


def _initial_rows(problem: NestedProblem, clip_ratios: tuple[float, ...]) -> NestedSolution:
    target = problem.targets[-1]  # the widest
    rows = target.shape[0]
    groups = target.view(rows, -1, problem.group_size)
    low, high = groups.amin(2), groups.amax(2)  # `aminmax` takes eight times as long
    middle, half_range = (high + low) / 2, (high - low) / 2
    half_range = torch.where(half_range > 0, half_range, 1e-8)
    diagonals = torch.stack([hessian.matrix.diagonal().float() for hessian in problem.hessians])
    best: NestedSolution | None = None
    best_cost: Tensor | None = None
    for ratio in clip_ratios:
        candidate = _rounded(problem, middle, half_range * ratio)
        cost = torch.zeros_like(middle)
        for index, importance in enumerate(problem.importance):
            error = problem.targets[index] - candidate.read_width(problem, index)
            weighted = importance * error.square_() * diagonals[index]
            cost += weighted.view(rows, -1, problem.group_size).sum(2)
        if problem.remainder_importance:
            cost += _remainder_cost(problem, candidate, diagonals[-1])
        if best is None or best_cost is None:
            best, best_cost = candidate, cost
            continue
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best.codes = torch.where(better.repeat_interleave(problem.group_size, 1), candidate.codes, best.codes)
        best.scale = torch.where(better, candidate.scale, best.scale)
        best.zero = torch.where(better, candidate.zero, best.zero)
    if best is None:
        raise ValueError("No clip ratio was given.")
    return best


def _remainder_cost(problem: NestedProblem, candidate: NestedSolution, diagonal: Tensor) -> Tensor:
    """The weighted error of two more bits spread evenly over the range of what the widest width leaves: [out, groups]."""
    remainder = problem.targets[-1] - candidate.read_width(problem, -1)
    groups = remainder.view(candidate.codes.shape[0], -1, problem.group_size)
    low, high = groups.amin(2), groups.amax(2)
    energy = diagonal.view(-1, problem.group_size).sum(1)
    return problem.remainder_importance * problem.importance[-1] * ((high - low) / 4).square_() / 12 * energy


def _rounded(problem: NestedProblem, middle: Tensor, half_range: Tensor) -> NestedSolution:
    """Levels of the finest code lie in the middles of equal parts of the range."""
    num_codes = 1 << problem.code_bits
    step = 2 * half_range / num_codes
    zero = middle - half_range + step / 2
    rows = middle.shape[0]
    groups = problem.targets[-1].reshape(rows, -1, problem.group_size)
    codes = ((groups - zero[:, :, None]) / step[:, :, None]).round_().clamp_(0, num_codes - 1)
    merged = [1 << shift for shift in problem.shifts]
    return NestedSolution(
        codes.view(rows, -1).to(torch.uint8),
        torch.stack([step * count for count in merged]),
        torch.stack([zero + step * ((count - 1) / 2) for count in merged]),
    )


def refit_group(
    problem: NestedProblem, solution: NestedSolution, group: int, values: Tensor, gradient: Tensor, hessian: Tensor
) -> Tensor:
    """Set one group's scale and zero of every width to the minimisers of its loss with all else fixed.

    values Ŵ and gradient (T − Ŵ)H of the group's columns [widths, out, group_size], hessian [widths, group_size,
    group_size]. Returns the values at the new float parts.
    """
    columns = slice(group * problem.group_size, (group + 1) * problem.group_size)
    codes = solution.codes[:, columns]
    levels = torch.stack([(codes >> shift).to(values.dtype) for shift in problem.shifts])
    centre = levels.mean(2, keepdim=True)
    levels = levels - centre
    coupled = levels @ hessian
    a = (coupled * levels).sum(2)
    b = coupled.sum(2)
    c = hessian.sum((1, 2))[:, None].expand_as(a)
    p, q = (gradient * levels).sum(2), gradient.sum(2)
    determinant = a * c - b * b
    solvable = determinant > _SINGULAR * a * c
    safe = torch.where(solvable, determinant, 1.0)
    scale_step = torch.where(solvable, (c * p - b * q) / safe, 0.0)
    middle_step = torch.where(solvable, (a * q - b * p) / safe, q / c)
    solution.scale[:, :, group] += scale_step
    solution.zero[:, :, group] += middle_step - scale_step * centre[:, :, 0]
    return values + scale_step[:, :, None] * levels + middle_step[:, :, None]


def refit(problem: NestedProblem, solution: NestedSolution) -> NestedSolution:
    """decoupleQ's closed form: the (s, z) of all groups of a row at once that minimise its loss for the given codes.

    Solves [[QHQᵀ, QHIᵀ], [IHQᵀ, IHIᵀ]] [s; z] = [QHt; IHt] per row in float64 (arXiv 2404.12759; Q holds a group's codes
    in its own row, I ones). A row whose loss does not fall keeps what it had.
    """
    rows, num_groups = solution.codes.shape[0], problem.num_groups
    candidate = solution.clone()
    for index, (shift, hessian) in enumerate(zip(problem.shifts, problem.hessians, strict=True)):
        matrix = hessian.matrix.to(torch.float32)
        levels = (solution.codes >> shift).view(rows, num_groups, -1).float()
        centre = levels.mean(2)
        centred = levels - centre[:, :, None]
        blocks = matrix.view(num_groups, problem.group_size, -1)
        ones = blocks.sum(1)  # IH: [groups, in]
        system = torch.empty(rows, 2 * num_groups, 2 * num_groups, device=levels.device)
        for group in range(num_groups):
            coupled = (centred[:, group] @ blocks[group]).view(rows, num_groups, -1)
            system[:, group, :num_groups] = (coupled * centred).sum(2)
            system[:, group, num_groups:] = coupled.sum(2)
        system[:, num_groups:, :num_groups] = system[:, :num_groups, num_groups:].transpose(1, 2)
        system[:, num_groups:, num_groups:] = ones.view(num_groups, num_groups, -1).sum(2)
        weighted = (problem.targets[index] @ matrix).view(rows, num_groups, -1)
        wanted = torch.cat([(weighted * centred).sum(2), weighted.sum(2)], dim=1)
        scale, middle = torch.split(_solve(system, wanted), num_groups, dim=1)
        candidate.scale[index] = scale
        candidate.zero[index] = middle - scale * centre
    accept_better_rows(problem, solution, candidate)
    return solution


def _solve(system: Tensor, wanted: Tensor) -> Tensor:
    matrices = system.double()
    matrices = (matrices + matrices.transpose(1, 2)) / 2
    mean = matrices.diagonal(dim1=1, dim2=2).mean(1)
    identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    matrices += 1e-9 * mean[:, None, None] * identity
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if int(failed.any()):
        matrices[failed > 0] += 0.01 * mean[failed > 0, None, None] * identity
        factors, _ = torch.linalg.cholesky_ex(matrices)
    return torch.cholesky_solve(wanted.double()[:, :, None], factors)[:, :, 0].float().nan_to_num_(0.0)


def accept_better_rows(problem: NestedProblem, solution: NestedSolution, candidate: NestedSolution) -> int:
    """Take over the rows (and, for equal codes, the widths) in which the candidate's loss is lower; returns how many.

    Codes belong to all widths, so a row with new codes is accepted as a whole, by its weighted loss.
    """
    old, new = proxy_loss(problem, solution), proxy_loss(problem, candidate)
    if torch.equal(solution.codes, candidate.codes):
        better = new < old  # [widths, out]
    else:
        weights = torch.tensor(problem.importance, dtype=old.dtype, device=old.device)
        better = ((weights @ new) < (weights @ old)).expand_as(old)
        solution.codes = torch.where(better[0, :, None], candidate.codes, solution.codes)
    solution.scale = torch.where(better[:, :, None], candidate.scale, solution.scale)
    solution.zero = torch.where(better[:, :, None], candidate.zero, solution.zero)
    return int(better.any(0).sum())
