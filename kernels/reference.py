"""The oracle: slow, plain definitions that every kernel is tested against.

Nothing here is tuned and nothing here is used while serving. Arithmetic is float32 unless the inputs are float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybit.kernels import layout
from anybit.kernels.nested import NestedWeight


def _per_weight(groups: Tensor, weight: NestedWeight) -> Tensor:
    """Spread per-group numbers [in/g, rows] over the weights they belong to: float32 [rows, in]."""
    return groups.float().T.repeat_interleave(weight.group_size, dim=1)


def dequantize(weight: NestedWeight, bit_width: int) -> Tensor:
    """Ŵ_r of FORMATS section 1, float32 [out, in]; reads only the streams of `bit_width`."""
    part = weight.affine[bit_width]
    scale, zero = _per_weight(part.scale, weight), _per_weight(part.zero, weight)
    codes = layout.unpack(weight.chunks, bit_width)
    if bit_width <= layout.NIBBLE_BITS:
        return (scale * codes.float() + zero)[: weight.out_features]
    residual_bits = bit_width - layout.NIBBLE_BITS
    hi = (codes >> residual_bits).float()
    lo = (codes & ((1 << residual_bits) - 1)).float()
    hi_scale = _per_weight(weight.affine[layout.NIBBLE_BITS].scale, weight)
    return ((hi_scale * hi + scale * lo) + zero)[: weight.out_features]


def linear(x: Tensor, weight: NestedWeight, bit_width: int) -> Tensor:
    """x Ŵ_rᵀ in float64, returned as float32: [tokens, in] -> [tokens, out]."""
    return (x.double() @ dequantize(weight, bit_width).double().T).float()


def matquant_slice(codes: Tensor, bit_width: int) -> Tensor:
    """MatQuant's published slice S(q, r) = clamp(⌊q/2^(8−r) + ½⌋, 0, 2^r − 1)·2^(8−r) (arXiv 2502.06786, section 3).

    Rounds where the nested code truncates, so it needs bit r+1 and its top bucket is 1.5 times as wide. uint8 -> uint8.
    """
    step = 1 << (layout.CODE_BITS - bit_width)
    rounded = (codes.int() + step // 2) // step
    return (rounded.clamp(0, (1 << bit_width) - 1) * step).to(torch.uint8)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of new tokens over their sequence's pages, in float64, one query at a time.

    q [seqs, tokens, heads, head_dim]; k_pages, v_pages [pages, kv_heads, page_size, head_dim];
    block_tables [seqs, max_pages]; positions [seqs, tokens]: the query at position p sees keys 0 .. p,
    or with a window p − window + 1 .. p. A softcap turns scores into softcap·tanh(score/softcap).
    Returns float32 [seqs, tokens, heads, head_dim].
    """
    num_seqs, num_tokens, num_heads, _ = q.shape
    group = num_heads // k_pages.shape[1]
    out = torch.zeros_like(q, dtype=torch.float64)
    for seq in range(num_seqs):
        pages = block_tables[seq]
        keys = k_pages[pages].double().transpose(1, 2).flatten(0, 1)  # [max_pages·page_size, kv_heads, head_dim]
        values = v_pages[pages].double().transpose(1, 2).flatten(0, 1)
        for token in range(num_tokens):
            length = int(positions[seq, token]) + 1
            seen = slice(0 if window is None else max(0, length - window), length)
            for head in range(num_heads):
                scores = keys[seen, head // group] @ q[seq, token, head].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[seq, token, head] = torch.softmax(scores, 0) @ values[seen, head // group]
    return out.float()


def choose_codes(
    targets: Tensor,
    origin: Tensor | None,
    coupling: Tensor,
    weights: Tensor,
    scale: Tensor,
    zero: Tensor,
    shifts: Sequence[int],
    num_codes: int,
) -> tuple[Tensor, Tensor]:
    """The integer step of the solvers, code by code, in float64; shapes in `kernels.portable.choose_codes`.

    Returns codes uint8 [out, columns] and, per code, how much worse each was than the next best: float64 [out, columns].
    """
    widths, rows, columns = targets.shape
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    margins = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        wanted = targets[:, row].double().clone()
        levels = torch.tensor(
            [
                [float(scale[r, row]) * (code >> shifts[r]) + float(zero[r, row]) for code in range(num_codes)]
                for r in range(widths)
            ],
            dtype=torch.float64,
        )
        for j in range(columns):
            costs = torch.zeros(num_codes, dtype=torch.float64)
            for r in range(widths):
                costs += float(weights[r, j]) * (wanted[r, j] - levels[r]) ** 2
            order = costs.argsort(stable=True)
            codes[row, j] = order[0]
            margins[row, j] = costs[order[1]] - costs[order[0]]
            for r in range(widths):
                start = wanted[r, j] if origin is None else origin[r, row, j].double()
                wanted[r, j + 1 :] += (start - levels[r, order[0]]) * coupling[r, j, j + 1 :].double()
    return codes, margins
