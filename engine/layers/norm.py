"""Root mean square normalisation."""

from dataclasses import dataclass

from torch import Tensor

from anybit.kernels import dispatch


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in float32 (arXiv 1910.07467, eq. 4)."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return dispatch.rms_norm(x, self.weight, self.eps)
