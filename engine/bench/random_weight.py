"""Weights for measurements of speed."""

from collections.abc import Sequence

import torch

from anybit.engine.bench.shapes import Shape
from anybit.kernels.nested import NestedWeight


def random_weight(
    shape: Shape, group_size: int, bit_widths: Sequence[int], device: torch.device | str = "cpu"
) -> NestedWeight:
    """Random codes (those of padding rows too), and float16 parts with which products keep the size of their inputs."""
    weight = NestedWeight.allocate(shape.out_features, shape.in_features, group_size, bit_widths, torch.float16, device)
    for chunk in weight.chunks.values():
        chunk.random_(256)
    for width, part in weight.affine.items():
        # Above 4 bits the zero stands for the middle of both nibbles.
        step = (12 / shape.in_features) ** 0.5 / (1 << width)
        part.scale.fill_(step)
        part.zero.fill_(-step * ((1 << width) - 1) / 2)
    return weight
