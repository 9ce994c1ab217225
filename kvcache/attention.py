"""Attention over sealed pages in plain PyTorch: a page at a time, so that no history is ever decoded as a whole.

What a query reads as codes follows from its position alone: its own page and the first tokens of its sequence are exact, all
else is sealed, in decoding and in prompts alike. Sums are taken page by page in the order of the pages.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.kernels.attention_inputs import AttentionSettings, ExactPages
from anybit.kernels.portable.elementwise import softcap_
from anybit.kernels.portable.matmul import ROW_MULTIPLE, batched_matmul
from anybit.kvcache.sealed import SealedPages
from anybit.kvcache.spec import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class PageTables:
    """Where the pages of a group of sequences are, int64, -1 where there is none.

    `sealed` [seqs, pages] are all pages before a sequence's own ones, `first` [seqs] the pages of its exact first tokens,
    `own` [seqs, own pages] the slots of the pages in which its queries lie, from page `first_own` [seqs] on.
    """

    sealed: Tensor
    first: Tensor
    own: Tensor
    first_own: Tensor


def attend(
    q: Tensor,
    exact: ExactPages,
    sealed: SealedPages,
    tables: PageTables,
    positions: Tensor,
    settings: AttentionSettings,
) -> Tensor:
    """Attend from new tokens, whose keys are in their own pages already.

    q [seqs, tokens, heads, head_dim], in the basis of the pages; positions int64 [seqs, tokens], in order. Returns float32
    [seqs, tokens, heads, head_dim] in the basis of the pages.
    """
    seqs, tokens, heads, head_dim = q.shape
    kv_heads = exact.keys.shape[1]
    rows = tokens * (heads // kv_heads)
    padding = -rows % ROW_MULTIPLE
    queries = (
        q.float().view(seqs, tokens, kv_heads, -1, head_dim).transpose(1, 2).reshape(seqs, kv_heads, rows, head_dim)
    )
    sums = _Sums(F.pad(queries * settings.scale, (0, 0, 0, padding)))
    row_positions = F.pad(positions.repeat_interleave(heads // kv_heads, 1), (0, padding))
    for page in range(int(positions.max()) // PAGE_SIZE + 1):
        keys, values, is_read = _sealed_page(sealed, tables, page)
        sums.add(keys, values, _seen(row_positions, page, settings.window, is_read, is_own=False), settings.softcap)
        keys, values, is_read = _own_page(exact, tables, page)
        sums.add(keys, values, _seen(row_positions, page, settings.window, is_read, is_own=True), settings.softcap)
    attended = sums.attended()[:, :, :rows].view(seqs, kv_heads, tokens, -1, head_dim)
    return attended.transpose(1, 2).reshape(seqs, tokens, heads, head_dim)


def _sealed_page(sealed: SealedPages, tables: PageTables, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [seqs, kv_heads, 64, head_dim] of one page of each sequence, and who has such a page."""
    page_ids = tables.sealed[:, page] if page < tables.sealed.shape[1] else torch.full_like(tables.first, -1)
    keys, values = sealed.read(page_ids.clamp_min(0))
    if page == 0:
        exact_keys, exact_values = sealed.read_exactly(tables.first.clamp_min(0))
        keys[:, :, : sealed.exact_tokens] = exact_keys
        values[:, :, : sealed.exact_tokens] = exact_values
    return keys, values, page_ids >= 0


def _own_page(exact: ExactPages, tables: PageTables, page: int) -> tuple[Tensor, Tensor, Tensor]:
    place = page - tables.first_own
    is_there = (place >= 0) & (place < tables.own.shape[1])
    slots = tables.own.gather(1, place.clamp(0, tables.own.shape[1] - 1)[:, None])[:, 0]
    slots = torch.where(is_there, slots, -1)
    chosen = slots.clamp_min(0)
    return exact.keys[chosen].float(), exact.values[chosen].float(), slots >= 0


def _seen(row_positions: Tensor, page: int, window: int | None, is_read: Tensor, is_own: bool) -> Tensor:
    """Which tokens of a page each row sees: bool [seqs, rows, 64]."""
    tokens = torch.arange(page * PAGE_SIZE, (page + 1) * PAGE_SIZE, device=row_positions.device)
    own = row_positions // PAGE_SIZE
    reads = (own == page) if is_own else (own > page)
    positions = row_positions[:, :, None]
    seen = (reads & is_read[:, None])[:, :, None] & (tokens <= positions)
    return seen if window is None else seen & (tokens > positions - window)


class _Sums:
    """Softmax over pages that come one after the other: largest score, sum of weights, weighted values."""

    def __init__(self, queries: Tensor) -> None:
        """float32 [seqs, kv_heads, rows, head_dim]."""
        self._queries = queries
        self._largest = torch.full_like(queries[..., :1], -torch.inf)
        self._norm = torch.zeros_like(self._largest)
        self._total = torch.zeros_like(queries)

    def add(self, keys: Tensor, values: Tensor, seen: Tensor, softcap: float | None) -> None:
        if not bool(seen.any()):
            return
        seqs, kv_heads, rows, head_dim = self._queries.shape
        scores = batched_matmul(self._queries.reshape(-1, rows, head_dim), keys.flatten(0, 1).transpose(1, 2))
        if softcap is not None:
            softcap_(scores, softcap)
        scores = scores.view(seqs, kv_heads, rows, PAGE_SIZE).masked_fill(~seen[:, None], -torch.inf)
        largest = torch.maximum(self._largest, scores.amax(-1, keepdim=True))
        # A row that has seen nothing yet has no largest score to compare with.
        reference = torch.where(largest == -torch.inf, 0.0, largest)
        weights = (scores - reference).exp_()
        # What no row sees is left over from another sequence; weighted 0, a number that is not finite would remain.
        values = values.masked_fill(~seen.any(1)[:, None, :, None], 0)
        factor = (self._largest - reference).exp_()
        added = batched_matmul(weights.view(-1, rows, PAGE_SIZE), values.flatten(0, 1))
        self._total = self._total * factor + added.view_as(self._total)
        self._norm = self._norm * factor + weights.sum(-1, keepdim=True)
        self._largest = largest

    def attended(self) -> Tensor:
        return self._total / self._norm
