"""Float parts of one width trained through the whole model, towards the float model's next-token distribution.

decoupleQ calls this its optional third step (arXiv 2404.12759, section 3.5, there with labels); here the target is the
float model itself, so any text will do and nothing but scales and zeros moves.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anybit.engine.quantize.calibrate.block import Block, Vectors
from anybit.engine.quantize.solve.coded import FloatPart
from anybit.engine.quantize.solve.precision import training_dtype, training_products
from anybit.engine.quantize.solve.trained import TrainedPart

_COMPARED_TOGETHER = 128


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
    """Minimise KL(float ‖ width) over tokens, cross entropy but for a constant; the new float parts of every block, by site.

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
        loss, gradient = distribution_gradient(hidden, data.targets[chosen], data.head)
        if not math.isfinite(loss):
            raise ArithmeticError(f"Training at {bit_width} bits diverged.")
        optimizer.zero_grad(set_to_none=True)
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(step + 1)
    return [{site: part.part() for site, part in sites.items()} for sites in trained]


def distribution_gradient(hidden: Tensor, targets: Tensor, head: Head) -> tuple[float, Tensor]:
    """Mean cross entropy over tokens, and its gradient to `hidden`; both [sequences, tokens, hidden].

    Some tokens at a time: logits of all of them would be by far the largest tensors here, and new memory each time.
    """
    leaf = hidden.detach().flatten(0, 1).requires_grad_()
    total = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    of_both = (torch.split(tensor, _COMPARED_TOGETHER) for tensor in (leaf, targets.flatten(0, 1)))
    for part, target in zip(*of_both, strict=True):
        with training_products(hidden.device):
            logits = head(part)
            with torch.no_grad():
                wanted = torch.softmax(head(target), -1, dtype=torch.float32)
        loss: Tensor = _CrossEntropy.apply(logits.float(), wanted)  # type: ignore[no-untyped-call]
        share = len(part) / len(leaf)
        loss.backward(loss.new_tensor(share))  # type: ignore[no-untyped-call]
        total += loss.detach() * share
    if leaf.grad is None:
        raise ValueError("There is nothing to compare.")
    return float(total), leaf.grad.view_as(hidden)


class _CrossEntropy(torch.autograd.Function):
    """Mean over tokens of −Σ wanted · log softmax(logits), both [..., vocab]; half of autograd's passes over them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        probabilities = torch.softmax(logits, -1)
        largest, token = logits.max(-1, keepdim=True)
        log_sum = largest - probabilities.gather(-1, token).log_()
        loss: Tensor = (log_sum[..., 0] - torch.linalg.vecdot(wanted, logits)).mean()
        ctx.save_for_backward(probabilities.sub_(wanted).div_(loss.new_tensor(log_sum.numel())))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference.mul_(gradient), None
