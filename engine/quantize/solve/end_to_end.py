"""Float parts of one width trained through the whole model, towards the float model's next-token distribution.

decoupleQ calls this its optional third step (arXiv 2404.12759, section 3.5, there with labels); here the target is the
float model itself, so any text will do and nothing but scales and zeros moves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anybit.engine.quantize.calibrate.block import Block, Vectors
from anybit.engine.quantize.solve.coded import FloatPart
from anybit.engine.quantize.solve.trained import TrainedPart

_COMPARED_EVERY = 2


@dataclass(frozen=True, slots=True)
class EndToEndOptions:
    """`steps` of Adam (β = 0.9, 0.99), `batch` sequences each; the rate falls linearly to zero."""

    steps: int
    batch: int = 1
    learning_rate: float = 2e-3
    train_scales: bool = True  # else only the zeros


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """A block with its trained vectors and, of one width, the codes and float part of every site."""

    block: Block
    vectors: Vectors
    codes: Mapping[str, Tensor]
    parts: Mapping[str, FloatPart]


@dataclass(frozen=True, slots=True)
class Distillation:
    """What is learnt from: token embeddings and the float model's last hidden states, [sequences, tokens, hidden].

    `head` turns last hidden states into logits; `order` names the sequences that steps take in turn.
    """

    embedded: Tensor
    targets: Tensor
    head: "Head"
    order: Sequence[int]


Head = Callable[[Tensor], Tensor]
"""Hidden states after the last block to logits."""


def train_end_to_end(
    blocks: Sequence[QuantizedBlock],
    bit_width: int,
    data: Distillation,
    options: EndToEndOptions,
    recompute: bool,
    progress: Callable[[int], None] = lambda steps: None,
) -> list[dict[str, FloatPart]]:
    """Minimise KL(float ‖ width) over tokens; returns the new float parts of every block, by site.

    With `recompute` a block's activations are computed again in the backward
    pass instead of being kept.
    """
    trained = [
        {site: TrainedPart(codes, bit_width, block.parts[site]) for site, codes in block.codes.items()}
        for block in blocks
    ]
    first = 0 if options.train_scales else 1
    optimizer = torch.optim.Adam(
        [change for sites in trained for part in sites.values() for change in part.changes[first:]],
        lr=options.learning_rate,
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.steps)

    def run_block(index: int, hidden: Tensor) -> Tensor:
        weights = {site: part.weight() for site, part in trained[index].items()}
        return blocks[index].block(hidden, weights, blocks[index].vectors)

    for step in range(options.steps):
        chosen = [data.order[(step * options.batch + i) % len(data.order)] for i in range(options.batch)]
        hidden = data.embedded[chosen]
        # Of neighbouring tokens one in two is compared: the head costs as much as several blocks.
        compared = slice(step % _COMPARED_EVERY, None, _COMPARED_EVERY)
        with torch.no_grad():
            expected = torch.log_softmax(data.head(data.targets[chosen][:, compared]), -1)
        for index in range(len(blocks)):
            hidden = (
                checkpoint(run_block, index, hidden, use_reentrant=False) if recompute else run_block(index, hidden)
            )
        log_probs = torch.log_softmax(data.head(hidden[:, compared]), -1)
        loss = F.kl_div(log_probs.flatten(0, 1), expected.flatten(0, 1), log_target=True, reduction="batchmean")
        if not bool(torch.isfinite(loss)):
            raise ArithmeticError(f"Training at {bit_width} bits diverged.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(step + 1)
    return [{site: part.part() for site, part in sites.items()} for sites in trained]
