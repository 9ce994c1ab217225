"""Pages of one sealed format over all layers."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels import fallbacks
from anybit.kernels.attention_inputs import AttentionSettings, ExactPages
from anybit.kernels.cuda.seal import PageSeals, can_seal, seal_pages
from anybit.kvcache.attention import PageTables, attend
from anybit.kvcache.codec.balance import PageBasis
from anybit.kvcache.formats import TAIL_DTYPE, is_rotated
from anybit.kvcache.gpu_records import layer_records
from anybit.kvcache.seal_clock import SealClock
from anybit.kvcache.sealed import SealedPages
from anybit.kvcache.spec import KVSpec


@dataclass(frozen=True, slots=True)
class Seals:
    """Which own pages become which sealed pages: int64 tensors, slots and page ids side by side.

    `first_slots` are those whose page is a sequence's first, `first_page_ids` the pages for their exact tokens. `numbers`
    says which of its sequence's own pages in this step each is, from 0 on.
    """

    slots: Tensor
    page_ids: Tensor
    first_slots: Tensor
    first_page_ids: Tensor
    numbers: Tensor

    def of_number(self, number: int) -> "Seals | None":
        """Those that are the pages of this number, if there are some."""
        chosen = self.numbers == number
        if not bool(chosen.any()):
            return None
        firsts = slice(None) if number == 0 else slice(0)
        return Seals(
            self.slots[chosen],
            self.page_ids[chosen],
            self.first_slots[firsts],
            self.first_page_ids[firsts],
            self.numbers[chosen],
        )


class SealedLayer:
    """One layer's sealed pages and their basis. Own pages, which are exact, hold vectors in that basis too."""

    def __init__(self, pages: SealedPages, basis: PageBasis) -> None:
        self.pages = pages
        self.basis = basis

    def seal(self, own: ExactPages, seals: Seals) -> None:
        """Encode pages that are full now, and keep the first tokens of those that are a sequence's first."""
        self._alike.seal(own.keys[None], own.values[None], seals)

    @functools.cached_property
    def _alike(self) -> "_AlikeLayers":
        return _AlikeLayers({0: self.pages})

    def attend(
        self, q: Tensor, own: ExactPages, tables: PageTables, positions: Tensor, settings: AttentionSettings
    ) -> Tensor:
        """q [seqs, tokens, heads, head_dim] as the model has them -> float32 of the same shape."""
        rotated = self.basis.queries(q.transpose(1, 2)).transpose(1, 2)
        attended = attend(rotated, own, self.pages, tables, positions, settings)
        return self.basis.restored_values(attended)


def sealed_layer(
    spec: KVSpec,
    layer: int,
    num_pages: int,
    weights: Sequence[Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> SealedLayer:
    """Empty pages of one layer in its format; `weights` as `SealedPool` has them."""
    kv_format = spec.kv_format(layer)
    return SealedLayer(
        SealedPages(kv_format, num_pages, spec.num_kv_heads, spec.head_dim, device),
        PageBasis(
            spec.head_dim,
            None if weights is None else weights[layer],
            is_rotated(kv_format.keys),
            is_rotated(kv_format.values),
            device,
        ),
    )


class SealedPool:
    """The layers' sealed pages; `weights` [kv_heads, head_dim] of each layer balance its keys, None: no layer's are."""

    def __init__(
        self,
        spec: KVSpec,
        num_pages: int,
        weights: Sequence[Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec = spec
        self.num_pages = num_pages
        self.clock = SealClock(device)
        self.layers = tuple(sealed_layer(spec, layer, num_pages, weights, device) for layer in range(spec.num_layers))
        by_format: dict[str, dict[int, SealedPages]] = {}
        for number, layer in enumerate(self.layers):
            by_format.setdefault(spec.kv_format(number).name, {})[number] = layer.pages
        self._alike = [_AlikeLayers(pages) for pages in by_format.values()]

    def seal(self, own_keys: Tensor, own_values: Tensor, seals: Seals) -> None:
        """`seal_layer` of all layers at once: own pages are [layers, pages, kv_heads, 64, head_dim]."""
        with self.clock.running():
            for layers in self._alike:
                layers.seal(own_keys, own_values, seals)

    def seal_layer(self, layer: int, own: ExactPages, seals: Seals) -> None:
        """`SealedLayer.seal`, timed."""
        with self.clock.running():
            self.layers[layer].seal(own, seals)


class _AlikeLayers:
    """Sealed pages of layers that have one format, by number: sealed together, on a GPU by one kernel if it knows them."""

    def __init__(self, pages: Mapping[int, SealedPages]) -> None:
        self._pages = pages
        self._first, *_ = pages.values()
        self._gpu_records = layer_records(pages)

    def seal(self, own_keys: Tensor, own_values: Tensor, seals: Seals) -> None:
        """Own pages are [layers, pages, kv_heads, 64, head_dim]; numbers count the first dimension."""
        if self._gpu_records is not None and can_seal(own_keys.dtype, own_keys.shape[-1], own_keys.device):
            places = (seals.slots, seals.page_ids, seals.first_slots, seals.first_page_ids)
            own = ExactPages(own_keys, own_values)
            seal_pages(own, self._gpu_records, PageSeals(*places, self._first.exact_tokens))
        else:
            if own_keys.is_cuda and own_keys.dtype == TAIL_DTYPE:  # served pages, not those of a check
                fallbacks.record("seal", "no kernel seals this format or head size here, so PyTorch does")
            self._seal(own_keys, own_values, seals)

    def _seal(self, own_keys: Tensor, own_values: Tensor, seals: Seals) -> None:
        keys, values = (
            torch.stack([own[layer][seals.slots] for layer in self._pages]) for own in (own_keys, own_values)
        )
        records = self._first.encode(keys, values)
        for pages, key_records, value_records in zip(self._pages.values(), *records, strict=True):
            pages.store(seals.page_ids, key_records, value_records)
        if len(seals.first_slots):
            for layer, pages in self._pages.items():
                firsts = (own[layer][seals.first_slots] for own in (own_keys, own_values))
                pages.keep_exactly(seals.first_page_ids, *firsts)
