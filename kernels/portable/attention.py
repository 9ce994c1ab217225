"""Paged causal attention in plain PyTorch, with a reduction order fixed by the page alone.

Scores and weighted values are computed page by page and added in the order of the pages, so that a query's result
depends on its position and its keys, never on how many tokens are computed beside it (ARCHITECTURE, "Same answer").
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.kernels.portable.elementwise import softcap_
from anybit.kernels.portable.matmul import ROW_MULTIPLE, batched_matmul

_QUERY_TILE = 64  # tokens of one sequence scored at a time; bounds the memory of the scores


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
    """Attend from new tokens to the tokens of their sequence up to their own position.

    q [seqs, tokens, heads, head_dim]; k_pages, v_pages [pages, kv_heads, page_size, head_dim];
    block_tables int64 [seqs, max_pages], short rows padded with any valid page; positions int64 [seqs, tokens].
    Keys of the new tokens must already be in their pages. With a `window`, only the newest that many tokens are seen;
    with a `softcap`, scores are softcap·tanh(score/softcap). Returns [seqs, tokens, heads, head_dim] in q's dtype,
    computed in float32.
    Oracle: `kernels.reference.paged_attention`.
    """
    page_size = k_pages.shape[2]
    keys = k_pages[block_tables].to(torch.float32)  # [seqs, max_pages, kv_heads, page_size, head_dim]
    values = v_pages[block_tables].to(torch.float32)
    out = torch.empty_like(q)
    for start in range(0, q.shape[1], _QUERY_TILE):
        tile = slice(start, min(start + _QUERY_TILE, q.shape[1]))
        num_pages = int(positions[:, tile].max()) // page_size + 1
        out[:, tile] = _attend(
            q[:, tile].to(torch.float32) * scale,
            keys[:, :num_pages],
            values[:, :num_pages],
            positions[:, tile],
            window,
            softcap,
        )
    return out


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None, softcap: float | None
) -> Tensor:
    seqs, tokens, heads, head_dim = q.shape
    _, pages, kv_heads, page_size, _ = keys.shape
    rows = tokens * (heads // kv_heads)
    padded = rows + -rows % ROW_MULTIPLE

    queries = q.view(seqs, tokens, kv_heads, -1, head_dim).transpose(1, 2).reshape(seqs, kv_heads, rows, head_dim)
    queries = F.pad(queries, (0, 0, 0, padded - rows))
    row_positions = F.pad(positions.repeat_interleave(heads // kv_heads, 1), (0, padded - rows))
    key_positions = torch.arange(pages * page_size, device=q.device).view(pages, 1, page_size)
    # What lies beyond a sequence's end is left over from another; weighted 0, a number that is not finite would remain.
    beyond = key_positions.view(pages, 1, page_size, 1) > positions.amax(1).view(seqs, 1, 1, 1, 1)
    values = values.masked_fill(beyond, 0)
    row_positions = row_positions.view(seqs, 1, padded, 1)
    hidden = key_positions > row_positions  # [seqs, pages, padded, page_size]
    if window is not None:
        hidden |= key_positions <= row_positions - window

    left = queries.unsqueeze(1).expand(-1, pages, -1, -1, -1).reshape(-1, padded, head_dim)
    scores = batched_matmul(left, keys.reshape(-1, page_size, head_dim).transpose(1, 2))
    if softcap is not None:
        softcap_(scores, softcap)
    scores = scores.view(seqs, pages, kv_heads, padded, page_size).masked_fill_(hidden.unsqueeze(2), -torch.inf)
    largest = scores.amax((1, 4), keepdim=True)
    weights = scores.sub_(largest).exp_()
    partial = batched_matmul(weights.view(-1, padded, page_size), values.reshape(-1, page_size, head_dim))
    partial = partial.view(seqs, pages, kv_heads, padded, head_dim)
    partial_sums = weights.sum(-1, keepdim=True)

    total, norm = partial[:, 0], partial_sums[:, 0]
    for page in range(1, pages):
        total = total + partial[:, page]
        norm = norm + partial_sums[:, page]
    attended = (total / norm)[:, :, :rows].view(seqs, kv_heads, tokens, -1, head_dim)
    return attended.transpose(1, 2).reshape(seqs, tokens, heads, head_dim)
