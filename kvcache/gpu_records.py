"""What a GPU's kernels are told of pages of ordered pairs: how they are encoded and how they are read."""

from collections.abc import Mapping

import torch
from torch import Tensor

from anybit.kernels.cuda.seal import LayerRecords, PairEntries
from anybit.kernels.cuda.sealed_attention import PairRecords, SealedRecords
from anybit.kvcache.codec.balance import PageBasis
from anybit.kvcache.codec.pages import CoarseCodec, PageCodec, PairCodec
from anybit.kvcache.codec.pairs import PairTable
from anybit.kvcache.sealed import SealedPages


def layer_records(layers: Mapping[int, SealedPages]) -> LayerRecords | None:
    """To encode layers with one format, by number; they have to stay alive. None if they are not ordered pairs on a GPU."""
    first, *_ = layers.values()
    device = first.keys.device
    keys, values = (_pair_entries(codec, device) for codec in first.codecs)
    if device.type != "cuda" or keys is None or values is None:
        return None
    addresses = [[pages.keys.data_ptr(), pages.values.data_ptr()] for pages in layers.values()]
    numbers, places = (torch.tensor(part, dtype=torch.int64, device=device) for part in (list(layers), addresses))
    return LayerRecords(numbers, places, keys, values)


def sealed_records(pages: SealedPages, basis: PageBasis) -> SealedRecords | None:
    """To read one layer. None if its pages are not ordered pairs."""
    keys, values = pages.codecs
    key_levels, value_levels = (_pair_levels(codec, pages.keys.device) for codec in pages.codecs)
    if key_levels is None or value_levels is None:
        return None
    if type(keys) is type(values) and _table(keys) is _table(values):
        value_levels = key_levels  # one table serves both
    return SealedRecords(
        PairRecords(pages.keys, key_levels),
        PairRecords(pages.values, value_levels),
        pages.exact_tokens,
        basis.signs if basis.rotates_values else None,
    )


def _table(codec: PageCodec) -> PairTable | None:
    if isinstance(codec, PairCodec | CoarseCodec) and isinstance(codec.table, PairTable):
        return codec.table
    return None


def _pair_entries(codec: PageCodec, device: torch.device) -> PairEntries | None:
    """Pages that are read by a coarser table are encoded by the whole one."""
    table = _table(codec)
    if table is None:
        return None
    return PairEntries(*(points.to(device, torch.float32).contiguous() for points in (table.entries, table.clusters)))


def _pair_levels(codec: PageCodec, device: torch.device) -> Tensor | None:
    """What each code stands for when it is read: float16 [codes, 2]."""
    table = _table(codec)
    if table is None:
        return None
    levels = codec.levels if isinstance(codec, CoarseCodec) else table.levels
    return levels.to(device, torch.float16).contiguous()
