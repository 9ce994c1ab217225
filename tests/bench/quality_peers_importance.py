"""Importance of each linear's inputs for llama.cpp's quantizer: their mean squares on a calibration text (its "imatrix")."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anybit.engine.batch import plan_batch
from anybit.engine.chunk import Chunk
from anybit.engine.evaluate.variant import Variant, start_sequence
from anybit.engine.layers.linear import DenseLinear
from anybit.engine.models.decoder import build_decoder
from anybit.engine.models.registry import parse_config
from anybit.engine.weights.loader import DenseLoader
from anybit.engine.weights.source import SourceModel
from anybit.kernels.widths import WidthSegment


@dataclass(slots=True)
class _ObservedLinear:
    """A linear that adds up the squares of its inputs."""

    linear: DenseLinear
    squares: Tensor
    rows: int = 0

    def __call__(self, x: Tensor, segments: Sequence[WidthSegment]) -> Tensor:
        self.squares += x.square().sum(0, dtype=torch.float64)
        self.rows += x.shape[0]
        return self.linear(x, segments)


@dataclass(slots=True)
class _ObservingLoader:
    """A DenseLoader whose linears are observed, by the names of the weights that share an input."""

    dense: DenseLoader
    observed: dict[tuple[str, ...], _ObservedLinear] = field(default_factory=dict)

    def linear(self, prefixes: Sequence[str], bias: bool) -> _ObservedLinear:
        linear = self.dense.linear(prefixes, bias)
        made = _ObservedLinear(linear, torch.zeros(linear.weight.shape[1], dtype=torch.float64))
        self.observed[tuple(f"{prefix}.weight" for prefix in prefixes)] = made
        return made

    def vocabulary(self, prefix: str) -> object:
        return self.dense.vocabulary(prefix)

    def vector(self, name: str) -> Tensor:
        return self.dense.vector(name)


def spread_windows(token_ids: Sequence[int], context: int, count: int) -> list[list[int]]:
    """`count` windows at equal distances over the tokens."""
    step = (len(token_ids) - context) / max(count - 1, 1)
    starts = [int(index * step) for index in range(count)]
    return [list(token_ids[start : start + context]) for start in starts]


def input_importance(source: SourceModel, token_windows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Mean square of each input of every linear, by the weight's name."""
    loader = _ObservingLoader(DenseLoader(source))
    decoder = build_decoder(parse_config(source.config), loader, len(token_windows[0]))  # type: ignore[arg-type]
    variant = Variant("importance", decoder, 8, "bf16", 0.0)
    for window in token_windows:
        sequence = start_sequence(window, variant)
        if variant.pool is not None:
            decoder.forward(plan_batch([Chunk(sequence, len(window))]), variant.pool)
    return {name: (linear.squares / linear.rows).float() for names, linear in loader.observed.items() for name in names}
