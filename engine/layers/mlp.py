"""The gated feed-forward block."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from anybit.engine.layers.linear import Linear
from anybit.kernels.dispatch import WidthSegment


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) · up(x)), with gate and up as one fused linear."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor, segments: Sequence[WidthSegment]) -> Tensor:
        gate, up = self.gate_up(x, segments).chunk(2, dim=-1)
        return self.down(_silu(gate).mul_(up), segments)


def _silu(x: Tensor) -> Tensor:
    """x / (1 + e^−x) from operations that round alike at every position of a tensor.

    PyTorch's own silu uses another exponential for the last few elements of a tensor than for the rest, which would
    make a row's result depend on how many rows are computed beside it.
    """
    return x / x.neg().exp_().add_(1)
