"""Channel scales moved from one linear to the next, so that a group's columns matter about equally; the block computes
the same.

AWQ (arXiv 2306.00978, section 3.2) multiplies a weight's columns by sˣ^α, a power of the size of their inputs, and
divides what produces these inputs by it: a norm's gains, the rows of V for the output projection, the rows of `up` for
`down`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.engine.models.config import DecoderConfig
from anybit.engine.quantize.calibrate.block import SITES, norm_names

_SAMPLED_EVERY = 8
_SMALLEST = 1e-6  # an input never smaller than this has no size to go by


class ChannelSizes:
    """Running mean square of each input channel at one site, from a sample of its tokens.

    Position 0, whose activations are unlike all others, is not among them.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._num_tokens = 0

    def add(self, x: Tensor) -> None:
        """x [sequences, tokens, in], of any floating type; tokens that are not finite do not count."""
        rows = x.detach()[:, 1::_SAMPLED_EVERY].flatten(0, 1).to(torch.float32)
        finite = torch.isfinite(rows).all(dim=1)
        self._sum += torch.where(finite[:, None], rows, 0.0).square().sum(0, dtype=torch.float64)
        self._num_tokens += int(finite.sum())

    @property
    def mean_square(self) -> Tensor:
        """float64 [in]."""
        return self._sum / max(self._num_tokens, 1)


@dataclass(frozen=True, slots=True)
class BalancedBlock:
    """A block's stacked weights and vectors after balancing; `input_scales` by site: what its inputs were divided by."""

    linears: dict[str, Tensor]
    vectors: dict[str, Tensor]
    input_scales: dict[str, Tensor]


def balance(
    config: DecoderConfig,
    linears: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor],
    sizes: Mapping[str, ChannelSizes],
    power: float,
) -> BalancedBlock:
    """Multiply each site's columns by size^`power`, geometric mean one, and divide what feeds them by the same."""
    qkv, output, gate_up, down = (site.name for site in SITES)
    attention_norm, mlp_norm = norm_names(config)
    columns = {site: _scales(sizes[site].mean_square, power).to(linears[site].dtype) for site in (qkv, gate_up, down)}
    per_kv_head, columns[output] = _shared_by_heads(config, sizes[output].mean_square, power)
    balanced = {site: weight * columns[site] for site, weight in linears.items()}
    changed = dict(vectors)
    for name, site in ((attention_norm, qkv), (mlp_norm, gate_up)):
        changed[name] = vectors[name] / columns[site]
    for site, last_rows in ((qkv, per_kv_head), (gate_up, columns[down])):
        balanced[site][-len(last_rows) :] /= last_rows[:, None]
        bias = f"{site}.bias"
        if bias in vectors:
            changed[bias] = vectors[bias].clone()
            changed[bias][-len(last_rows) :] /= last_rows
    return BalancedBlock(balanced, changed, columns)


def _scales(mean_square: Tensor, power: float) -> Tensor:
    logarithms = mean_square.sqrt().clamp_min(_SMALLEST).log() * power
    return (logarithms - logarithms.mean()).exp()


def _shared_by_heads(config: DecoderConfig, mean_square: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Scales of V's rows, and the same repeated for the query heads that share them, which are o's input channels."""
    heads = mean_square.view(config.num_kv_heads, -1, config.head_dim)
    per_kv_head = _scales(heads.mean(1), power).to(torch.float32)
    return per_kv_head.flatten(), per_kv_head[:, None].expand(heads.shape).flatten()
