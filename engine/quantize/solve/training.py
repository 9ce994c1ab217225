"""decoupleQ's second stage: codes stay, float parts and norms of a block learn to reproduce the float block's output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.engine.quantize.calibrate.block import Block, Vectors
from anybit.engine.quantize.solve.coded import FloatPart
from anybit.engine.quantize.solve.precision import training_dtype, training_products
from anybit.engine.quantize.solve.trained import TrainedPart


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """`steps` of Adam (β = 0.9, 0.99) over all widths; the rate falls linearly to zero.

    Each step sees `tokens` tokens of one sequence. `learning_rate` is relative to a scale, `norm_learning_rate` to a
    norm's gain.
    """

    steps: int = 16
    tokens: int = 1024
    learning_rate: float = 4e-3
    norm_learning_rate: float = 1e-3
    train_norms: bool = True


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Inputs and wanted outputs of a block at each width, [sequences, tokens, hidden].

    `order` names the sequences that steps take in turn, `held_out` those that decide whether training has helped.
    """

    inputs: Mapping[int, Tensor]
    targets: Mapping[int, Tensor]
    order: Sequence[int]
    held_out: Sequence[int]


Parts = Mapping[int, Mapping[str, TrainedPart]]
"""Bit-width -> site -> float part."""


def block_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output − target|² / |target|², without position 0, whose huge activations drown the rest.

    [sequences, tokens, hidden]; arXiv 2404.12759, eq. 15, normalised per token.
    """
    output, target = output[:, 1:], target[:, 1:]
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-6)).mean()


def train_block(
    block: Block,
    parts: Parts,
    vectors: Vectors,
    data: TrainingData,
    importance: Mapping[int, float],
    options: TrainingOptions,
) -> tuple[dict[int, dict[str, FloatPart]], dict[str, Tensor]]:
    """Train all widths' float parts and one shared set of norms; returns both, or what it began with.

    If the weighted loss over the held-out sequences has risen, nothing is changed.
    """
    started = _float_parts(parts)
    gains = {name: torch.zeros_like(vectors[name], requires_grad=options.train_norms) for name in block.norm_names}
    changes = [change for sites in parts.values() for part in sites.values() for change in part.changes]
    groups: list[dict[str, object]] = [{"params": changes, "lr": options.learning_rate}]
    if options.train_norms:
        groups.append({"params": list(gains.values()), "lr": options.norm_learning_rate})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.steps)

    def loss(width: int, sequences: slice) -> Tensor:
        tokens = slice(0, options.tokens)
        inputs = data.inputs[width][sequences, tokens]
        weights = {site: part.weight(training_dtype(inputs.device)) for site, part in parts[width].items()}
        trained = {**vectors, **_with_gains(vectors, gains)}
        with training_products(inputs.device):
            output = block(inputs, weights, trained)
        return importance[width] * block_loss(output, data.targets[width][sequences, tokens])

    def held_out_loss() -> float:
        with torch.no_grad():
            return sum(float(loss(width, slice(index, index + 1))) for index in data.held_out for width in parts)

    before = held_out_loss()
    for step in range(options.steps):
        index = data.order[step % len(data.order)]
        optimizer.zero_grad(set_to_none=True)
        for width in parts:
            loss(width, slice(index, index + 1)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    if not held_out_loss() <= before:  # not a number either
        return started, dict(vectors)
    return _float_parts(parts), {
        **vectors,
        **{name: norm.detach() for name, norm in _with_gains(vectors, gains).items()},
    }


def _with_gains(vectors: Vectors, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: vectors[name] * (1 + change) for name, change in changes.items()}


def _float_parts(parts: Parts) -> dict[int, dict[str, FloatPart]]:
    return {width: {site: part.part() for site, part in sites.items()} for width, sites in parts.items()}
