"""What a solver is given and what it finds: one weight's codes, shared by several widths, and a float part per width."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anybit.engine.quantize.calibrate.moments import DampedHessian


@dataclass(frozen=True, slots=True)
class NestedProblem:
    """Minimise Σ_r importance_r · tr((T_r − Ŵ_r) H_r (T_r − Ŵ_r)ᵀ) over codes shared by the widths r.

    A code has `code_bits` bits and width r reads the top r of them: Ŵ_r = s_r · (code >> (code_bits − r)) + z_r, with
    s, z per row and group of `group_size` inputs. `targets` float32 [widths, out, in] (expanded where equal),
    `hessians` and `importance` one per width. With `remainder_importance`, what the widest width leaves over is coded
    too, later: grids are then chosen with an eye to its range, counted by the error of four levels across it.
    """

    bit_widths: tuple[int, ...]
    code_bits: int
    group_size: int
    targets: Tensor
    hessians: tuple[DampedHessian, ...]
    importance: tuple[float, ...]
    remainder_importance: float = 0.0

    @property
    def num_groups(self) -> int:
        return self.targets.shape[2] // self.group_size

    @property
    def shifts(self) -> tuple[int, ...]:
        return tuple(self.code_bits - width for width in self.bit_widths)

    def of_rows(self, rows: slice) -> "NestedProblem":
        """The same for some rows: they are independent."""
        return replace(self, targets=self.targets[:, rows])

    @property
    def hessian_stack(self) -> Tensor:
        """float32 [widths, in, in]."""
        return _stack([hessian.matrix for hessian in self.hessians])

    @property
    def factor_stack(self) -> Tensor:
        """The upper factors of the inverses, float32 [widths, in, in]."""
        return _stack([hessian.inverse_factor for hessian in self.hessians])


@dataclass(slots=True)
class NestedSolution:
    """Codes uint8 [out, in] and float parts [widths, out, groups], in float32 until they are stored."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def of_rows(self, rows: slice) -> "NestedSolution":
        """Views: what is written there is written here."""
        return NestedSolution(self.codes[rows], self.scale[:, rows], self.zero[:, rows])

    def clone(self) -> "NestedSolution":
        return NestedSolution(self.codes.clone(), self.scale.clone(), self.zero.clone())

    def read(self, problem: NestedProblem) -> Tensor:
        """Ŵ_r of every width: float32 [widths, out, in]."""
        return torch.stack([self.read_width(problem, index) for index in range(len(problem.bit_widths))])

    def read_width(self, problem: NestedProblem, index: int) -> Tensor:
        rows = self.codes.shape[0]
        levels = (self.codes >> problem.shifts[index]).view(rows, -1, problem.group_size).float()
        return (levels * self.scale[index, :, :, None] + self.zero[index, :, :, None]).view(rows, -1)


def proxy_loss(problem: NestedProblem, solution: NestedSolution) -> Tensor:
    """tr(E H Eᵀ) per width and row, E = T − Ŵ: float64 [widths, out]. Never negative, since H is positive definite."""
    error = problem.targets - solution.read(problem)
    return (multiply(error, problem.hessian_stack) * error).sum(2, dtype=torch.float64)


def multiply(values: Tensor, matrices: Tensor) -> Tensor:
    """values [widths, out, k] @ matrices [widths, k, n]; widths that share one matrix are multiplied as one."""
    if matrices.stride(0) == 0:
        return (values.reshape(-1, values.shape[2]) @ matrices[0]).view(*values.shape[:2], -1)
    return values @ matrices


def _stack(matrices: list[Tensor]) -> Tensor:
    first = matrices[0]
    if all(matrix is first for matrix in matrices):
        return first.to(torch.float32).expand(len(matrices), *first.shape)
    return torch.stack([matrix.to(torch.float32) for matrix in matrices])
