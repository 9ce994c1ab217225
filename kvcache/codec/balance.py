"""The basis in which pages are kept: keys balanced by channel, keys and values rotated.

A rotation spreads a page's error evenly over channels, while queries weigh channels unevenly. Keys times w and queries over
w have the same products; with w² = rms(q)/σ(k) the error of the products is least (reference: KVCACHE, form 2).
"""

import torch
from torch import Tensor

from anybit.kernels.page_layout import PAGE_TOKENS
from anybit.kernels.portable.hadamard import rotate, rotation_signs, unrotate


class BalanceMoments:
    """Second moments of one layer's queries and keys, added up over texts, and the weights that follow from them."""

    def __init__(self) -> None:
        self._queries = _Mean()
        self._spread = _Mean()

    def add(self, queries: Tensor, keys: Tensor) -> None:
        """queries [sequences, heads, tokens, head_dim], keys [sequences, kv_heads, tokens, head_dim], as in attention.

        Only whole pages of keys count, for σ(k) is what varies within a page; ValueError if there are none.
        """
        sequences, kv_heads, tokens, head_dim = keys.shape
        if tokens < PAGE_TOKENS:
            raise ValueError(f"Balance weights need a page of {PAGE_TOKENS} tokens at least, not {tokens}.")
        whole = tokens // PAGE_TOKENS * PAGE_TOKENS
        pages = keys[:, :, :whole].float().reshape(sequences, kv_heads, -1, PAGE_TOKENS, head_dim)
        self._spread.add((pages - pages.mean(3, keepdim=True)).square().transpose(1, 3).flatten(0, 2))
        by_head = queries.float().reshape(sequences, kv_heads, -1, head_dim)
        self._queries.add(by_head.square().transpose(1, 2).flatten(0, 1))

    def weights(self) -> Tensor:
        """w of each KV head and channel, of geometric mean 1: float32 [kv_heads, head_dim]."""
        sizes, spread = self._queries.value().sqrt(), self._spread.value().sqrt()
        logs = (_positive(sizes).log() - _positive(spread).log()) / 2
        return (logs - logs.mean(1, keepdim=True)).exp()


class _Mean:
    """Of rows [rows, kv_heads, head_dim] that come in parts; in float64, so that many can come."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, rows: Tensor) -> None:
        total = rows.sum(0, dtype=torch.float64)
        self._total = total if self._total is None else self._total + total
        self._count += len(rows)

    def value(self) -> Tensor:
        """float32 [kv_heads, head_dim]; ValueError before the first rows."""
        if self._total is None:
            raise ValueError("Balance weights need a text.")
        return (self._total / self._count).float()


def balance_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """`BalanceMoments.weights` of one part: float32 [kv_heads, head_dim]."""
    moments = BalanceMoments()
    moments.add(queries, keys)
    return moments.weights()


class PageBasis:
    """Takes one layer's queries, keys and values into the basis of its pages, and attention's output back.

    `weights` [kv_heads, head_dim] from `balance_weights`, or None for no balance; they matter where keys are rotated.
    """

    def __init__(
        self,
        head_dim: int,
        weights: Tensor | None = None,
        rotates_keys: bool = True,
        rotates_values: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self._signs = rotation_signs(head_dim).to(device)
        self._weights = weights.to(device) if weights is not None and rotates_keys else None
        self.rotates_keys, self.rotates_values = rotates_keys, rotates_values

    @property
    def signs(self) -> Tensor:
        """Of the rotation: float32 [head_dim]."""
        return self._signs

    @property
    def weights(self) -> Tensor | None:
        """Of the keys: float32 [kv_heads, head_dim]."""
        return self._weights

    def keys(self, keys: Tensor) -> Tensor:
        """[..., kv_heads, tokens, head_dim] -> float32 of the same shape."""
        if not self.rotates_keys:
            return keys.float()
        return rotate(keys if self._weights is None else keys * self._weights[:, None], self._signs)

    def queries(self, queries: Tensor) -> Tensor:
        """[..., heads, tokens, head_dim] -> float32 of the same shape; a KV head's query heads are adjacent."""
        if not self.rotates_keys:
            return queries.float()
        if self._weights is not None:
            repeat = queries.shape[-3] // len(self._weights)
            queries = queries / self._weights.repeat_interleave(repeat, 0)[:, None]
        return rotate(queries, self._signs)

    def values(self, values: Tensor) -> Tensor:
        return rotate(values, self._signs) if self.rotates_values else values.float()

    def restored_keys(self, keys: Tensor) -> Tensor:
        """Inverse of `keys`."""
        if not self.rotates_keys:
            return keys
        keys = unrotate(keys, self._signs)
        return keys if self._weights is None else keys / self._weights[:, None]

    def restored_values(self, values: Tensor) -> Tensor:
        """Inverse of `values`; of attention's output too, which is a mean of values."""
        return unrotate(values, self._signs) if self.rotates_values else values


def _positive(sizes: Tensor) -> Tensor:
    return sizes.clamp_min(1e-3 * sizes.mean(1, keepdim=True)).clamp_min(torch.finfo(sizes.dtype).tiny)
