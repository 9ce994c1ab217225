"""The memory behind the pages."""

from collections.abc import Mapping

import torch
from torch import Tensor

from anybit.kernels.attention_inputs import ExactPages
from anybit.kvcache.memory import zeroed
from anybit.kvcache.sealed_pool import SealedPool, Seals
from anybit.kvcache.spec import PAGE_SIZE, KVSpec


class KVPool:
    """Keys and values of every exact page, per layer [pages, kv_heads, PAGE_SIZE, head_dim], and by format the sealed pages.

    Sequences of sealed formats write in exact pages too, until these are full.
    """

    def __init__(
        self,
        spec: KVSpec,
        num_pages: int,
        device: torch.device | str = "cpu",
        sealed: Mapping[str, SealedPool] | None = None,
    ) -> None:
        self.spec = spec
        self.num_pages = num_pages
        self.sealed = sealed or {}
        on_cpu = torch.device(device).type == "cpu"
        shape = (spec.num_layers, 2, num_pages + (not on_cpu), spec.num_kv_heads, PAGE_SIZE, spec.head_dim)
        self._pages = zeroed(shape, spec.dtype, device)

    @property
    def scratch_page(self) -> int:
        """On a GPU a page beyond `num_pages` that belongs to nobody: rows which only pad a batch write there."""
        return self.num_pages

    def keys(self, layer: int) -> Tensor:
        return self._pages[layer, 0]

    def values(self, layer: int) -> Tensor:
        return self._pages[layer, 1]

    def seal(self, kv_format: str, seals: Seals) -> None:
        """Encode own pages of all layers that are full now."""
        self.sealed[kv_format].seal(self._pages[:, 0], self._pages[:, 1], seals)

    def exact(self, layer: int) -> ExactPages:
        return ExactPages(self.keys(layer), self.values(layer))

    def write(self, layer: int, page_ids: Tensor, offsets: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store new tokens: page_ids, offsets int64 [tokens]; keys, values [tokens, kv_heads, head_dim]."""
        self._pages[layer, 0, page_ids, :, offsets] = keys.to(self.spec.dtype)
        self._pages[layer, 1, page_ids, :, offsets] = values.to(self.spec.dtype)
