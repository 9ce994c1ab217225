"""Full pages of keys and values encoded on an NVIDIA GPU, of all layers at once."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels.attention_inputs import ExactPages
from anybit.kernels.cuda.driver import can_launch, defined, load_kernel
from anybit.kernels.page_layout import PAGE_TOKENS

_THREADS = 256  # of a block, as in source/seal.cu
_HEAD_DIMS = (64, 128, 256)
_CODE_BITS = (4, 6, 8)


@dataclass(frozen=True, slots=True)
class PairEntries:
    """What ordered pairs are encoded by: `entries` float32 [2^(bits−1), 2].

    The nearest of `clusters` float32 [clusters, 2] is chosen first, then the nearest of its entries, which lie side by
    side; a single cluster stands for all entries.
    """

    entries: Tensor
    clusters: Tensor

    @property
    def code_bits(self) -> int:
        return len(self.entries).bit_length()

    @property
    def num_clusters(self) -> int:
        return len(self.clusters)

    @property
    def addresses(self) -> tuple[int | None, int | None]:
        """Of entries and clusters."""
        return self.entries.data_ptr(), self.clusters.data_ptr()


@dataclass(frozen=True, slots=True)
class UniformLevels:
    """Encoded in evenly spaced levels of 8 bits: of each channel of a page's keys, of each token of its values."""

    @property
    def code_bits(self) -> int:
        """Of two neighbours, as with pairs."""
        return 16

    @property
    def num_clusters(self) -> int:
        return 1

    @property
    def addresses(self) -> tuple[int | None, int | None]:
        """They need no entries and no clusters."""
        return None, None


@dataclass(frozen=True, slots=True)
class LayerRecords:
    """Layers whose records have one form: int64 `layers` [n], and the `addresses` [n, 2] of their keys' and values' records.

    Records lie as `page_layout` says, contiguous uint8 [pages, kv_heads, bytes]; keys' of pairs have a mean.
    """

    layers: Tensor
    addresses: Tensor
    keys: PairEntries | UniformLevels
    values: PairEntries | UniformLevels


@dataclass(frozen=True, slots=True)
class PageSeals:
    """Own pages and the pages of records that they become, int64 each.

    Of own pages `first_slots` the first `exact_tokens` tokens are kept as they are, in the records of `first_page_ids`.
    """

    slots: Tensor
    page_ids: Tensor
    first_slots: Tensor
    first_page_ids: Tensor
    exact_tokens: int


class _Problem(ctypes.Structure):
    """`SealProblem` of source/seal.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("own_keys", "own_values", "layers", "records")),
        *((name, ctypes.c_void_p) for name in ("key_entries", "key_clusters", "value_entries", "value_clusters")),
        *((name, ctypes.c_void_p) for name in ("slots", "page_ids", "first_slots", "first_page_ids")),
        ("layer_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("pages", "kv_heads", "exact_tokens")),
    ]


def can_seal(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether own pages of this type can be sealed here."""
    return dtype == torch.bfloat16 and head_dim in _HEAD_DIMS and device.type == "cuda" and can_launch(device)


def seal_pages(own: ExactPages, records: LayerRecords, seals: PageSeals) -> None:
    """Write records of own pages, bfloat16 [layers, pages, kv_heads, 64, head_dim], each layer's contiguous.

    A page with a number that is not finite is read back as not-a-number. Source: source/seal.cu; waits for nothing.
    """
    _, _, kv_heads, _, head_dim = own.keys.shape
    pages, firsts = len(seals.slots), len(seals.first_slots)
    if pages + firsts == 0:
        return
    _check(own, records)
    before = (own.keys, own.values, records.layers, records.addresses)
    after = (seals.slots, seals.page_ids, seals.first_slots, seals.first_page_ids)
    problem = _Problem(
        *(tensor.data_ptr() for tensor in before),
        *records.keys.addresses,
        *records.values.addresses,
        *(tensor.data_ptr() for tensor in after),
        layer_stride=own.keys.stride(0),
        pages=pages,
        kv_heads=kv_heads,
        exact_tokens=seals.exact_tokens,
    )
    kernel = load_kernel("seal", "seal_pages", seal_constants(head_dim, records.keys, records.values))
    kernel.launch(((pages + firsts) * kv_heads, 2, len(records.layers)), _THREADS, [problem])


def seal_constants(
    head_dim: int, keys: PairEntries | UniformLevels, values: PairEntries | UniformLevels
) -> tuple[tuple[str, int], ...]:
    """What source/seal.cu is compiled for."""
    return defined(
        HEAD_DIM=head_dim,
        KEY_BITS=keys.code_bits,
        VALUE_BITS=values.code_bits,
        KEY_CLUSTERS=keys.num_clusters,
        VALUE_CLUSTERS=values.num_clusters,
    )


def _check(own: ExactPages, records: LayerRecords) -> None:
    for pages in (own.keys, own.values):
        if pages.shape[3] != PAGE_TOKENS or pages.stride(0) != own.keys.stride(0) or not pages[0].is_contiguous():
            raise ValueError("Own pages of each layer are contiguous, and keys' as far from each other as values'.")
    for part in (records.keys, records.values):
        if isinstance(part, UniformLevels):
            continue
        if part.code_bits not in _CODE_BITS or len(part.entries) % len(part.clusters):
            raise ValueError("Pairs have codes of 4, 6 or 8 bits, and clusters as many entries each.")
