"""From logits to the next token. A draw depends on the request's seed and position only, never on the batch."""

import hashlib
import math
import struct
from collections.abc import Sequence as ReadOnly

import torch
from torch import Tensor

from anybit.engine.types import SamplingParams
from anybit.kernels import dispatch


def sample(
    logits: Tensor,
    params: ReadOnly[SamplingParams],
    num_generated: ReadOnly[int],
    likeliest_tokens: ReadOnly[int] | None = None,
) -> list[int | None]:
    """The next token of each row, or None where the logits are not finite.

    logits float32 [rows, vocab]; `num_generated[i]` tokens were drawn for row i before. `likeliest_tokens` is
    `dispatch.greedy` of the logits where that is known.
    """
    if likeliest_tokens is None:
        likeliest_tokens = dispatch.greedy(logits).tolist()
    tokens: list[int | None] = []
    for row, (likeliest, param, count) in enumerate(zip(likeliest_tokens, params, num_generated, strict=True)):
        if likeliest < 0:
            tokens.append(None)
        elif param.temperature == 0 or param.top_k == 1:
            tokens.append(likeliest)
        else:
            tokens.append(_draw(logits[row], param, _uniform(param.seed, count)))
    return tokens


def _draw(logits: Tensor, params: SamplingParams, uniform: float) -> int:
    """Inverse-CDF draw from the tempered distribution, cut to min-p, then top-k, then the nucleus.

    Min-p: arXiv 2407.01082; nucleus: arXiv 1904.09751.
    """
    # Float64 and a full sort: the cost of one row is small beside a forward pass, and ties stay in token order.
    ordered, token_ids = torch.sort(logits.double() / params.temperature, descending=True, stable=True)
    if params.min_p:
        ordered = ordered[: int((ordered >= ordered[0] + math.log(params.min_p)).sum())]
    if params.top_k:
        ordered = ordered[: params.top_k]
    probabilities = torch.softmax(ordered, 0)
    cumulative = probabilities.cumsum(0)
    if params.top_p < 1:
        # The smallest set whose mass reaches top_p: a token stays if the mass before it is below top_p.
        kept = int((cumulative - probabilities < params.top_p).sum())
        cumulative = cumulative[: max(kept, 1)]
    position = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return int(token_ids[min(position, cumulative.numel() - 1)])


def _uniform(seed: int, count: int) -> float:
    """A number in [0, 1) that depends on seed and position alone, so that preemption and batching cannot change it."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed & (2**64 - 1), count), digest_size=8).digest()
    return math.ldexp(int.from_bytes(digest, "little") >> 11, -53)
