"""How each method solves one weight, from its proxy Hessians to codes and float parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.engine.quantize.calibrate.moments import DampedHessian
from anybit.engine.quantize.solve.affine import accept_better_rows, initial_solution, refit
from anybit.engine.quantize.solve.coded import CodedWeight, FloatPart
from anybit.engine.quantize.solve.problem import NestedProblem, NestedSolution, proxy_loss
from anybit.engine.quantize.solve.sweep import descent_pass, gptq_pass
from anybit.kernels import layout

Hessians = Mapping[int, DampedHessian]
"""Bit-width -> the damped Hessian of what the linear is fed at that width."""

_DECOUPLEQ_ROUNDS = 3
_DESCENT_PASSES = 4
_RESIDUAL_PASSES = 1
_LOW_IMPORTANCE = {2: 1.25, 3: 1.3, 4: 1.25}
_REMAINDER_IMPORTANCE = 1.0
_RESIDUAL_IMPORTANCE = {6: 2.0, 8: 1.0}
_REPORTED_ROWS = 96


@dataclass(frozen=True, slots=True)
class Solved:
    """A weight's codes and, per width, its relative proxy loss tr(EHEᵀ)/tr(WHWᵀ), of evenly spaced rows."""

    weight: CodedWeight
    losses: dict[int, float]


def solve_gptq(problem: NestedProblem) -> NestedSolution:
    """GPTQ on clip-searched grids; with several widths each column's code is the best for all of them."""
    solution = initial_solution(problem)
    gptq_pass(problem, solution)
    return solution


def solve_decoupleq(
    problem: NestedProblem,
    rounds: int = _DECOUPLEQ_ROUNDS,
    integer_step: Callable[[NestedProblem, NestedSolution], None] = gptq_pass,
    trace: list[float] | None = None,
) -> NestedSolution:
    """decoupleQ's first stage: integer step and closed-form (s, z) in turn, each accepted per row if its loss falls.

    arXiv 2404.12759, algorithm 1. The weighted loss after each step is appended to `trace`; it never rises.
    """
    solution = initial_solution(problem)

    def record() -> None:
        if trace is not None:
            weights = torch.tensor(problem.importance, dtype=torch.float64, device=problem.targets.device)
            trace.append(float(weights @ proxy_loss(problem, solution).sum(1)))

    def step_integers() -> int:
        candidate = solution.clone()
        integer_step(problem, candidate)
        return accept_better_rows(problem, solution, candidate)

    record()
    step_integers()
    record()
    for _ in range(rounds):
        refit(problem, solution)
        record()
        improved = step_integers()
        record()
        if improved < 1e-4 * solution.codes.shape[0]:
            break
    refit(problem, solution)
    record()
    return solution


def solve_joint(problem: NestedProblem) -> NestedSolution:
    """A GPTQ pass, then coordinate descent over codes and float parts of all widths together."""
    solution = solve_gptq(problem)
    for _ in range(_DESCENT_PASSES):
        descent_pass(problem, solution)
    return solution


def solve_fine(problem: NestedProblem) -> NestedSolution:
    """As `solve_joint`, with less effort: what 4 bits leave over is small and has no tails worth clipping."""
    solution = initial_solution(problem, (1.0, 0.9))
    gptq_pass(problem, solution)
    for _ in range(_RESIDUAL_PASSES):
        descent_pass(problem, solution)
    return solution


Solver = Callable[[NestedProblem], NestedSolution]


def solve_shared(
    weight: Tensor,
    hessians: Hessians,
    bit_widths: Sequence[int],
    group_size: int,
    solver: Solver,
    has_residual: bool = False,
) -> Solved:
    """Codes of the widest of `bit_widths`, shared by all of them: widths up to 4, or a single one.

    `has_residual`: a low nibble will follow. What clipping cuts off the high one widens the range that it must cover.
    """
    widths = tuple(sorted(bit_widths))
    energies = _energies(weight, hessians, widths)
    problem = NestedProblem(
        widths,
        max(widths),
        group_size,
        weight.expand(len(widths), *weight.shape),
        tuple(hessians[width] for width in widths),
        _balanced(energies, _LOW_IMPORTANCE if len(widths) > 1 else dict.fromkeys(widths, 1.0)),
        _REMAINDER_IMPORTANCE if has_residual else 0.0,
    )
    solution = solver(problem)
    codes = solution.codes << (layout.CODE_BITS - max(widths))
    coded = CodedWeight(codes, _parts(solution, widths))
    if max(widths) > layout.NIBBLE_BITS:
        coded = coded.with_high_step(max(widths))
    return Solved(coded, _losses(problem, solution, energies))


def solve_residual(weight: Tensor, high: CodedWeight, hessians: Hessians, bit_widths: Sequence[int]) -> Solved:
    """The low nibble: what the 4-bit scale leaves of `weight`, coded for the widths above 4 bits together.

    `weight` may differ from what the high nibble was solved for, as when norms were trained since.
    """
    widths = tuple(sorted(bit_widths))
    rows = weight.shape[0]
    step = high.parts[layout.NIBBLE_BITS].scale[:, :, None]
    nibbles = high.codes_at(layout.NIBBLE_BITS).view(rows, -1, high.group_size).float()
    residual = weight - (nibbles * step).view(rows, -1)
    problem = NestedProblem(
        tuple(width - layout.NIBBLE_BITS for width in widths),
        layout.NIBBLE_BITS,
        high.group_size,
        residual.expand(len(widths), *residual.shape),
        tuple(hessians[width] for width in widths),
        tuple(_RESIDUAL_IMPORTANCE[width] * 4.0 ** (width - 4) for width in widths),
    )
    solution = solve_fine(problem)
    coded = CodedWeight(high.codes | solution.codes, {**high.parts, **_parts(solution, widths)})
    return Solved(coded, _losses(problem, solution, _energies(weight, hessians, widths)))


def solve_uniform(
    weight: Tensor, hessians: Hessians, bit_widths: Sequence[int], group_size: int, sliced: bool = False
) -> Solved:
    """GPTQ with one min-max grid: a code of the widest width, read at the others by its top bits.

    `sliced` rounds for the widest width alone; otherwise each column's code is the best for all widths together. Scales
    above 3 bits stay powers of two of each other, as one grid demands; all other float parts are refitted.
    """
    widths = tuple(sorted(bit_widths))
    solved_for = widths[-1:] if sliced else widths
    targets = weight.expand(len(widths), *weight.shape)
    energies = _energies(weight, hessians, widths)
    importance = _balanced(energies, {2: 1.0, 3: 1.0, 4: 1.0, 6: 0.05, 8: 0.01})
    matrices = tuple(hessians[width] for width in widths)
    full = NestedProblem(widths, max(widths), group_size, targets, matrices, importance)
    chosen = [widths.index(width) for width in solved_for]
    problem = NestedProblem(
        solved_for,
        max(widths),
        group_size,
        targets[: len(chosen)],
        tuple(matrices[index] for index in chosen),
        tuple(importance[index] for index in chosen),
    )
    clip = (1.0,) if max(widths) > layout.NIBBLE_BITS else None
    solution = initial_solution(problem) if clip is None else initial_solution(problem, clip)
    gptq_pass(problem, solution)
    step, zero = solution.scale[-1], solution.zero[-1]
    merged = [1 << shift for shift in full.shifts]
    shared = NestedSolution(
        solution.codes,
        torch.stack([step * count for count in merged]),
        torch.stack([zero + step * ((count - 1) / 2) for count in merged]),
    )
    tied = torch.tensor([width >= layout.NIBBLE_BITS for width in widths], device=weight.device)[:, None, None]
    scales, zeros = shared.scale.clone(), shared.zero.clone()
    if len(widths) > 1:
        refit(full, shared)
    if max(widths) > layout.NIBBLE_BITS:
        shared.scale = torch.where(tied, scales, shared.scale)
        shared.zero = torch.where(tied, zeros, shared.zero)
    coded = CodedWeight(shared.codes << (layout.CODE_BITS - max(widths)), _parts(shared, widths))
    if max(widths) > layout.NIBBLE_BITS and layout.NIBBLE_BITS not in widths:
        coded = coded.with_high_step(max(widths))
    return Solved(coded, _losses(full, shared, energies))


def _some_rows(num_rows: int) -> slice:
    """Those that losses are told of: all of them would take as long as a pass of the descent."""
    return slice(0, num_rows, max(1, num_rows // _REPORTED_ROWS))


def _energies(weight: Tensor, hessians: Hessians, widths: Sequence[int]) -> dict[int, float]:
    """tr(WHWᵀ) by width, of some rows; widths that share a Hessian share the product."""
    found: dict[int, float] = {}
    rows = weight[_some_rows(len(weight))]
    for width in widths:
        hessian = hessians[width]
        if id(hessian) not in found:
            found[id(hessian)] = float(((rows @ hessian.matrix.float()) * rows).sum()) or 1.0
    return {width: found[id(hessians[width])] for width in widths}


def _balanced(energies: Mapping[int, float], importance: Mapping[int, float]) -> tuple[float, ...]:
    """Importances that make the widths' losses comparable: a bit more is a quarter of the error."""
    weights = [importance[width] * 4.0 ** (width - min(energies)) / energy for width, energy in energies.items()]
    return tuple(value / weights[0] for value in weights)


def _losses(problem: NestedProblem, solution: NestedSolution, energies: Mapping[int, float]) -> dict[int, float]:
    rows = _some_rows(solution.codes.shape[0])
    losses = proxy_loss(problem.of_rows(rows), solution.of_rows(rows)).sum(1).tolist()
    return {width: loss / energy for (width, energy), loss in zip(energies.items(), losses, strict=True)}


def _parts(solution: NestedSolution, widths: Sequence[int]) -> dict[int, FloatPart]:
    return {
        width: FloatPart(scale, zero) for width, scale, zero in zip(widths, solution.scale, solution.zero, strict=True)
    }
