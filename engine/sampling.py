"""From logits to the next token. A draw depends on the request's seed and position only, never on the batch."""

import hashlib
import math
import struct
from collections.abc import Sequence as ReadOnly

import torch
from torch import Tensor

from anybit.engine.types import SamplingParams
from anybit.kernels import dispatch

_LIKELY = 512
"""So many of the likeliest tokens decide nearly every draw; only the rest takes a sort of the whole vocabulary."""


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
    tokens: list[int | None] = [None if token < 0 else token for token in likeliest_tokens]
    rows = [row for row, param in enumerate(params) if is_drawn(param) and tokens[row] is not None]
    uniforms = [_uniform(params[row].seed, num_generated[row]) for row in rows]
    # A GPU takes all rows in a few launches; a processor gains nothing from that.
    at_once = len(rows) if logits.is_cuda else 1
    for start in range(0, len(rows), max(at_once, 1)):
        part = rows[start : start + at_once]
        chosen = _draw_likely(logits[part], [params[row] for row in part], uniforms[start : start + at_once])
        for row, uniform, token in zip(part, uniforms[start : start + at_once], chosen, strict=True):
            tokens[row] = _draw(logits[row], params[row], uniform) if token < 0 else token
    return tokens


def is_drawn(params: SamplingParams) -> bool:
    """Whether a request's tokens are drawn; else each is the likeliest."""
    return params.temperature != 0 and params.top_k != 1


def _draw_likely(logits: Tensor, params: ReadOnly[SamplingParams], uniforms: ReadOnly[float]) -> list[int]:
    """`_draw` of each row of logits [rows, vocab], from the likeliest tokens alone; −1 where these do not decide."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scaled = logits.double() / column([param.temperature for param in params])
    vocabulary = scaled.shape[1]
    ids = scaled.topk(min(_LIKELY, vocabulary)).indices.sort(-1).values
    values, order = scaled.gather(1, ids).sort(dim=-1, descending=True, stable=True)  # equals in token order
    # Of tokens as likely as the last one here, others may have been left out.
    is_known = values > values[:, -1:] if ids.shape[1] < vocabulary else torch.ones_like(values, dtype=torch.bool)
    num_known = is_known.sum(-1, keepdim=True)
    least = values[:, :1] + column([math.log(param.min_p) if param.min_p else -math.inf for param in params])
    top_k = column([float(param.top_k or vocabulary) for param in params])
    top_p = column([param.top_p for param in params])
    # Min-p and top-k leave a prefix. If its end is known so is its mass, else that is the mass of all likely enough.
    kept = is_known & (values >= least) & (torch.arange(values.shape[1], device=values.device) < top_k)
    num_kept = kept.sum(-1, keepdim=True)
    weights = torch.where(kept, (values - values[:, :1]).exp(), 0.0)
    cumulative = weights.cumsum(-1)
    has_end = (num_kept < num_known) | (top_k <= num_known)
    of_all = torch.where(scaled >= least, (scaled - values[:, :1]).exp(), 0.0).sum(-1, keepdim=True)
    mass = torch.where(has_end, cumulative[:, -1:], torch.where(top_k >= vocabulary, of_all, torch.nan))
    # The nucleus is a prefix of that: a token stays if the mass before it is below top_p.
    num_nucleus = (kept & (cumulative - weights < top_p * mass)).sum(-1, keepdim=True)
    ends_here = (has_end | (num_nucleus < num_kept)) & ~mass.isnan()
    last = (num_nucleus - 1).clamp_min(0)
    of_nucleus = torch.where(ends_here, cumulative.gather(1, last), torch.where(top_p >= 1, mass, torch.nan))
    index = torch.searchsorted(cumulative, column(list(uniforms)) * of_nucleus, right=True)
    decided = ends_here | ((index < num_kept) & ~of_nucleus.isnan())
    tokens = ids.gather(1, order.gather(1, index.minimum(last)))
    chosen: list[int] = torch.where(decided, tokens, -1)[:, 0].tolist()
    return chosen


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
