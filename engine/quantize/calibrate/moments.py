"""Second moments of a linear's input, the proxy Hessian of its quantization error, and its damping."""

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_TOKENS = 4096
_STRIP = 192


class InputMoments:
    """Running E[x xᵀ] and E[x] of the inputs at one site, in float64.

    Products and sums of up to 4,096 tokens are formed in float32 (never in TF32 or bf16) and added up in float64.
    Tokens whose input is not finite are left out and counted.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        # Of a symmetric matrix strips of rows are summed from their diagonal block to the right.
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._mean_sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.num_tokens = 0
        self.num_skipped = 0

    def add(self, x: Tensor) -> None:
        """x [..., in], float32 or, from a forward pass in mixed precision, bfloat16."""
        with torch.autocast(x.device.type, enabled=False):
            self._add(x.detach().reshape(-1, x.shape[-1]).to(torch.float32))

    def _add(self, rows: Tensor) -> None:
        # One pass: a sum is finite only if all its terms are.
        if not bool(torch.isfinite(rows.sum())):
            finite = torch.isfinite(rows).all(dim=1)
            self.num_skipped += int((~finite).sum())
            rows = rows[finite]
        for chunk in torch.split(rows, _CHUNK_TOKENS):
            for start in range(0, chunk.shape[1], _STRIP):
                strip = slice(start, start + _STRIP)
                self._sum[strip, start:] += chunk[:, strip].T @ chunk[:, start:]
            self._mean_sum += chunk.sum(0)
        self.num_tokens += rows.shape[0]

    def divide_inputs(self, factors: Tensor) -> None:
        """Make these the moments of x / `factors`, [in]."""
        scale = factors.to(self._sum.dtype)
        self._sum /= scale[:, None] * scale
        self._mean_sum /= scale

    @property
    def hessian(self) -> Tensor:
        """E[x xᵀ], float64 [in, in]."""
        return (self._sum.triu() + self._sum.triu(1).T) / max(self.num_tokens, 1)

    @property
    def mean(self) -> Tensor:
        return self._mean_sum / max(self.num_tokens, 1)

    @property
    def is_full_rank(self) -> bool:
        """Whether there were at least as many tokens as inputs; if not, damping alone makes H invertible."""
        return self.num_tokens >= self._sum.shape[0]


@dataclass(frozen=True, slots=True)
class DampedHessian:
    """H + λI in float64, and U of (H + λI)⁻¹ = UᵀU with U upper triangular; λ is `damping` times the mean diagonal."""

    matrix: Tensor
    inverse_factor: Tensor
    damping: float

    def rescaled(self, factors: Tensor) -> "DampedHessian":
        """The same for inputs multiplied by `factors` [in], damping included."""
        scale = factors.to(self.matrix.dtype)
        return DampedHessian(self.matrix * scale[:, None] * scale, self.inverse_factor / scale, self.damping)


def damp(hessian: Tensor, damping: float) -> DampedHessian:
    """Add λI to a proxy Hessian and factor its inverse, with ten times the damping as often as Cholesky fails.

    Inputs that are always zero get a diagonal of one, so that their weights round to nearest. ArithmeticError if the
    matrix stays indefinite, which only numbers that are not finite can cause.
    """
    diagonal = hessian.diagonal()
    dead = torch.diag_embed((diagonal <= 0).to(hessian.dtype))
    mean = float(diagonal.mean()) or 1.0
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    while damping <= 1e3:
        matrix = hessian + damping * mean * identity + dead
        # From the last row to the first, H = RRᵀ with R upper triangular: U = R⁻¹ without inverting H.
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if not int(failed):
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return DampedHessian(matrix, factor, damping)
        damping = max(10 * damping, 1e-4)
    raise ArithmeticError("The calibration inputs are not finite.")
