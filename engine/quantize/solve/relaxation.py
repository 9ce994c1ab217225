"""decoupleQ's other integer step: the codes' box is searched by projected gradients before anything is rounded."""

from dataclasses import replace

import torch
from torch import Tensor

from anybit.engine.quantize.solve.problem import NestedProblem, NestedSolution
from anybit.engine.quantize.solve.sweep import gptq_pass

_STEPS = 200


def relaxed_pass(problem: NestedProblem, solution: NestedSolution) -> None:
    """Replace the codes by GPTQ's roundings of the weights that solve the relaxed problem (arXiv 2404.12759, eq. 11)."""
    gptq_pass(replace(problem, targets=relax(problem, solution)), solution)


def relax(problem: NestedProblem, solution: NestedSolution, steps: int = _STEPS) -> Tensor:
    """Projected Adam on tr((V − T) H (V − T)ᵀ) within the range of the levels: [widths, out, in].

    β = (0.9, 0.999); the rate is a fiftieth of a group's step and falls linearly to zero.
    """
    hessians = problem.hessian_stack
    levels = torch.tensor(
        [(1 << width) - 1 for width in problem.bit_widths], device=problem.targets.device, dtype=torch.float32
    )
    end = solution.zero + solution.scale * levels[:, None, None]
    low = torch.minimum(solution.zero, end).repeat_interleave(problem.group_size, 2)
    high = torch.maximum(solution.zero, end).repeat_interleave(problem.group_size, 2)
    rate = solution.scale.abs().repeat_interleave(problem.group_size, 2) / 50
    values = problem.targets.clamp(low, high)
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    for step in range(1, steps + 1):
        gradient = (values - problem.targets) @ hessians
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        direction = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-12)
        values = (values - rate * (1 - (step - 1) / steps) * direction).clamp_(low, high)
    return values
