"""Pages of one sealed format over all layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels.attention_inputs import AttentionSettings, ExactPages
from anybit.kvcache.attention import PageTables, attend
from anybit.kvcache.codec.balance import PageBasis
from anybit.kvcache.formats import is_rotated
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
        self.pages.seal(seals.page_ids, own.keys[seals.slots], own.values[seals.slots])
        if len(seals.first_slots):
            self.pages.keep_exactly(seals.first_page_ids, own.keys[seals.first_slots], own.values[seals.first_slots])

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
        self._alike: dict[str, list[int]] = {}
        for layer in range(spec.num_layers):
            self._alike.setdefault(spec.kv_format(layer).name, []).append(layer)

    def seal(self, own_keys: Tensor, own_values: Tensor, seals: Seals) -> None:
        """`seal_layer` of all layers at once: own pages are [layers, pages, kv_heads, 64, head_dim]."""
        with self.clock.running():
            self._seal(own_keys, own_values, seals)

    def seal_layer(self, layer: int, own: ExactPages, seals: Seals) -> None:
        """`SealedLayer.seal`, timed."""
        with self.clock.running():
            self.layers[layer].seal(own, seals)

    def _seal(self, own_keys: Tensor, own_values: Tensor, seals: Seals) -> None:
        for layers in self._alike.values():
            keys, values = (own[layers][:, seals.slots] for own in (own_keys, own_values))
            encoded = self.layers[layers[0]].pages.encode(keys, values)
            for index, key_records, value_records in zip(layers, *encoded, strict=True):
                self.layers[index].pages.store(seals.page_ids, key_records, value_records)
        if len(seals.first_slots):
            for layer, layer_keys, layer_values in zip(self.layers, own_keys, own_values, strict=True):
                firsts = seals.first_slots
                layer.pages.keep_exactly(seals.first_page_ids, layer_keys[firsts], layer_values[firsts])
