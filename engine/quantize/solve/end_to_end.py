"""Float parts of one width trained through the whole model, towards the float model's next-token distribution.

decoupleQ calls this its optional third step (arXiv 2404.12759, section 3.5, there with labels); here the target is the
float model itself, so any text will do and nothing but scales and zeros moves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anybit.engine.quantize.calibrate.block import Block, Vectors
from anybit.engine.quantize.solve.coded import FloatPart
from anybit.engine.quantize.solve.precision import training_dtype, training_products
from anybit.engine.quantize.solve.trained import TrainedPart

_COMPARED_TOGETHER = 256
_NORMALIZED_TOGETHER = 1 << 19  # logits of whole tokens that a CPU's caches hold in float32


@dataclass(frozen=True, slots=True)
class EndToEndOptions:
    """`steps` of Adam (β = 0.9, 0.99) that see so many tokens each; the rate falls linearly to zero."""

    steps: int
    tokens: int = 256
    learning_rate: float = 2e-3
    train_scales: bool = True  # else only the zeros

    def sequences(self, embedded: Tensor) -> int:
        """Of a step, where sequences are [sequences, tokens, hidden]."""
        return max(1, self.tokens // embedded.shape[1])


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
    """Minimise KL(float ‖ width) over tokens; the new float parts of every block, by site.

    With `recompute` a block's activations are computed again in the backward pass instead of being kept.
    """
    trained = [
        {site: TrainedPart(codes, bit_width, block.parts[site]) for site, codes in block.codes.items()}
        for block in blocks
    ]
    first = 0 if options.train_scales else 1
    optimizer = torch.optim.Adam(
        [change for sites in trained for part in sites.values() for change in part.changes[first:]],
        lr=options.learning_rate,
        fused=True,
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.steps)

    def run_block(index: int, hidden: Tensor) -> Tensor:
        weights = {site: part.weight(training_dtype(hidden.device)) for site, part in trained[index].items()}
        with training_products(hidden.device):
            return blocks[index].block(hidden, weights, blocks[index].vectors)

    together = options.sequences(data.embedded)
    for step in range(options.steps):
        chosen = [data.order[(step * together + i) % len(data.order)] for i in range(together)]
        hidden = data.embedded[chosen]
        for index in range(len(blocks)):
            hidden = (
                checkpoint(run_block, index, hidden, use_reentrant=False) if recompute else run_block(index, hidden)
            )
        gradient = distribution_gradient(hidden, data.targets[chosen], data.head)
        if not bool(torch.isfinite(gradient).all()):
            raise ArithmeticError(f"Training at {bit_width} bits diverged.")
        optimizer.zero_grad(set_to_none=True)
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(step + 1)
    return [{site: part.part() for site, part in sites.items()} for sites in trained]


def distribution_gradient(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """The gradient to `hidden` of the mean divergence over tokens; all [sequences, tokens, hidden].

    Of logits it is the difference of the distributions. Some tokens at a time: logits of all of them would be by far the
    largest tensors here, and new memory each time. Distributions are formed of fewer still: they are only passed through.
    """
    leaf = hidden.detach().flatten(0, 1).requires_grad_()
    of_both = (torch.split(tensor, _COMPARED_TOGETHER) for tensor in (leaf, targets.flatten(0, 1)))
    for part, target in zip(*of_both, strict=True):
        with training_products(hidden.device):
            logits = head(part)
            with torch.no_grad():
                wanted = head(target)
        few = len(part) if hidden.device.type != "cpu" else max(1, _NORMALIZED_TOGETHER // logits.shape[1])
        for ours, theirs in zip(torch.split(logits.detach(), few), torch.split(wanted, few), strict=True):
            theirs.copy_(_probabilities(ours).sub_(_probabilities(theirs)).div_(len(leaf)))
        logits.backward(wanted)  # type: ignore[no-untyped-call]
    if leaf.grad is None:
        raise ValueError("There is nothing to compare.")
    return leaf.grad.view_as(hidden)


def _probabilities(logits: Tensor) -> Tensor:
    """In float32, or in what is wider."""
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
