"""The gated feed-forward block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from anybit.engine.layers.linear import Linear
from anybit.kernels.widths import WidthSegment


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(activation(gate(x)) · up(x)), with gate and up as one fused linear."""

    gate_up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, segments: Sequence[WidthSegment]) -> Tensor:
        gate, up = self.gate_up(x, segments).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up), segments)
