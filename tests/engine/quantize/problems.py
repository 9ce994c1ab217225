"""Small solver problems with correlated inputs."""

import torch

from anybit.engine.quantize.calibrate.moments import damp
from anybit.engine.quantize.solve.problem import NestedProblem

ROWS, INPUTS, GROUP = 24, 64, 32


def inputs(tokens: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator) * 0.3 + torch.eye(INPUTS)
    return torch.randn(tokens, INPUTS, generator=generator) @ mixing


def nested_problem(
    bit_widths=(2, 3, 4), code_bits: int | None = None, group_size: int = GROUP, seed: int = 0
) -> NestedProblem:
    x = inputs(seed=seed)
    hessian = damp((x.T @ x / len(x)).double(), 0.01)
    weight = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(seed + 1))
    importance = tuple(4.0 ** (width - bit_widths[0]) for width in bit_widths)
    count = len(bit_widths)
    targets = weight.expand(count, *weight.shape)
    return NestedProblem(bit_widths, code_bits or max(bit_widths), group_size, targets, (hessian,) * count, importance)
