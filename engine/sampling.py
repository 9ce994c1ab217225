"""From logits to the next token. A draw depends on the request's seed and position only, never on the batch."""

import hashlib
import math
import struct
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.engine.types import SamplingParams
from anybit.kernels import dispatch

_LIKELY = 512
"""So many of the likeliest tokens decide nearly every draw; only the rest takes a sort of the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class FoundTokens:
    """What is known of a step's tokens before its logits are looked at.

    Per row the likeliest token or, with `has_draws`, the next one; −1 where a logit is not finite, UNDECIDED where only
    all of the logits tell.
    """

    tokens: list[int]
    has_draws: bool = False


UNDECIDED = -2


def sample(
    logits: Tensor,
    params: ReadOnly[SamplingParams],
    num_generated: ReadOnly[int],
    found: FoundTokens | None = None,
) -> list[int | None]:
    """The next token of each row, or None where the logits are not finite.

    logits float32 [rows, vocab]; `num_generated[i]` tokens were drawn for row i before.
    """
    found = found or FoundTokens(dispatch.greedy(logits).tolist())
    tokens: list[int | None] = [None if token == -1 else token for token in found.tokens]
    if found.has_draws:
        rows = [row for row, token in enumerate(tokens) if token == UNDECIDED]
    else:
        rows = [row for row, param in enumerate(params) if is_drawn(param) and tokens[row] is not None]
        # A GPU takes all rows in a few launches; a processor gains nothing from that.
        at_once = len(rows) if logits.is_cuda else 1
        for start in range(0, len(rows), max(at_once, 1)):
            part = rows[start : start + at_once]
            settings = draw_settings([params[row] for row in part], [num_generated[row] for row in part])
            chosen = draw_likely(logits[part], settings.to(logits.device)).tolist()
            for row, token in zip(part, chosen, strict=True):
                tokens[row] = token
        rows = [row for row in rows if tokens[row] == UNDECIDED]
    for row in rows:
        tokens[row] = _draw(logits[row], params[row], _uniform(params[row].seed, num_generated[row]))
    return tokens


def is_drawn(params: SamplingParams) -> bool:
    """Whether a request's tokens are drawn; else each is the likeliest."""
    return params.temperature != 0 and params.top_k != 1


_NEVER = -1.0
NOT_DRAWN = (1.0, -math.inf, math.inf, 1.0, _NEVER)
"""Temperature, logarithm of min-p, top-k, top-p and the number that decides: of a row that is not drawn."""
NUM_SETTINGS = len(NOT_DRAWN)


def draw_settings(params: ReadOnly[SamplingParams], num_generated: ReadOnly[int]) -> Tensor:
    """What `draw_likely` must know of each row: float64 [NUM_SETTINGS, rows]."""
    columns = [
        (
            param.temperature,
            math.log(param.min_p) if param.min_p else -math.inf,
            float(param.top_k or math.inf),
            param.top_p,
            _uniform(param.seed, count),
        )
        if is_drawn(param)
        else NOT_DRAWN
        for param, count in zip(params, num_generated, strict=True)
    ]
    return torch.tensor(columns, dtype=torch.float64).view(-1, NUM_SETTINGS).T.contiguous()


def draw_likely(logits: Tensor, settings: Tensor) -> Tensor:
    """`_draw` of each row of logits [rows, vocab] without sorting them: int64 [rows], UNDECIDED where top-k or the nucleus
    ends beyond the likeliest tokens, and for rows that are not drawn. On a GPU it waits for nothing, so that it can be
    captured as part of a step.

    Where nothing but min-p cuts, what is less likely stands behind the likeliest in the order of tokens, not of likelihood:
    an order as good as any for a draw from all of them.
    """
    temperature, least_share, top_k, top_p, uniform = settings[:, :, None]
    scaled = logits.double() / temperature
    vocabulary = scaled.shape[1]
    top_k = top_k.clamp_max(vocabulary)
    ids = logits.topk(min(_LIKELY, vocabulary)).indices.sort(-1).values
    values, order = scaled.gather(1, ids).sort(dim=-1, descending=True, stable=True)  # equals in token order
    # Of tokens as likely as the last one here, others may have been left out.
    is_known = values > values[:, -1:] if ids.shape[1] < vocabulary else torch.ones_like(values, dtype=torch.bool)
    num_known = is_known.sum(-1, keepdim=True)
    least = values[:, :1] + least_share
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
    index = torch.searchsorted(cumulative, uniform * of_nucleus, right=True)
    tokens = ids.gather(1, order.gather(1, index.minimum(last)))
    decided = (uniform != _NEVER) & (ends_here | ((index < num_kept) & ~of_nucleus.isnan()))
    chosen = torch.where(decided, tokens, UNDECIDED)
    beyond = ~decided & (uniform != _NEVER) & ~of_nucleus.isnan()
    if logits.is_cuda or bool(beyond.any()):
        rest = torch.where(scaled >= least, (scaled - values[:, :1]).exp(), 0.0)
        rest = rest.scatter(1, ids.gather(1, order), torch.where(kept, 0.0, rest.gather(1, ids.gather(1, order))))
        rest_sums = rest.cumsum(-1)
        # Rounding must not carry a draw beyond the last token that there is.
        wanted = (uniform * of_nucleus - cumulative[:, -1:]).clamp_min(0).minimum(rest_sums[:, -1:] * (1 - 1e-12))
        others = torch.searchsorted(rest_sums, wanted, right=True).clamp_max(vocabulary - 1)
        chosen = torch.where(beyond & (rest_sums[:, -1:] > 0), others, chosen)
    return chosen[:, 0]


def next_tokens(likeliest: Tensor, logits: Tensor, settings: Tensor) -> Tensor:
    """Of each row its likeliest token, or −1, as `dispatch.greedy` gives them, or else what is drawn: int64 [rows]."""
    drawn = draw_likely(logits, settings)
    return torch.where((settings[-1] == _NEVER) | (likeliest < 0), likeliest, drawn)


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
