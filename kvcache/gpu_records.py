"""What a GPU's kernels are told of pages: how they are encoded and how they are read."""

from collections.abc import Mapping

import torch
from torch import Tensor

from anybit.kernels.cuda.seal import LayerRecords, PairEntries, UniformLevels
from anybit.kernels.cuda.sealed_attention import PairRecords, SealedRecords, UniformRecords
from anybit.kvcache.codec.balance import PageBasis
from anybit.kvcache.codec.pages import CoarseCodec, PageCodec, PairCodec, UniformCodec
from anybit.kvcache.codec.pairs import PairTable
from anybit.kvcache.formats import codec_of
from anybit.kvcache.sealed import SealedPages


def has_kernels(name: str) -> bool:
    """Whether a GPU's kernels seal and read pages of this sealed format."""
    codec = codec_of(name, for_keys=True)
    return _is_uniform8(codec) or _table(codec) is not None


def layer_records(layers: Mapping[int, SealedPages]) -> LayerRecords | None:
    """To encode layers with one format, by number; they have to stay alive. None if no kernel of a GPU encodes them."""
    first, *_ = layers.values()
    device = first.keys.device
    keys, values = (_entries(codec, device) for codec in first.codecs)
    if device.type != "cuda" or keys is None or values is None:
        return None
    addresses = [[pages.keys.data_ptr(), pages.values.data_ptr()] for pages in layers.values()]
    numbers, places = (torch.tensor(part, dtype=torch.int64, device=device) for part in (list(layers), addresses))
    return LayerRecords(numbers, places, keys, values)


def sealed_records(pages: SealedPages, basis: PageBasis) -> SealedRecords | None:
    """To read one layer. None if no kernel reads its pages."""
    keys, values = (_records(*part) for part in zip(pages.codecs, (pages.keys, pages.values), strict=True))
    if keys is None or values is None:
        return None
    if isinstance(keys, PairRecords) and isinstance(values, PairRecords) and _have_one_table(*pages.codecs):
        values = PairRecords(values.records, keys.levels)
    return SealedRecords(keys, values, pages.exact_tokens, basis.signs if basis.rotates_values else None)


def _records(codec: PageCodec, records: Tensor) -> PairRecords | UniformRecords | None:
    if _is_uniform8(codec):
        return UniformRecords(records)
    levels = _pair_levels(codec, records.device)
    return None if levels is None else PairRecords(records, levels)


def _is_uniform8(codec: PageCodec) -> bool:
    """Whether levels are evenly spaced, of the one width that the kernels know."""
    return isinstance(codec, UniformCodec) and codec.bits == 8


def _have_one_table(keys: PageCodec, values: PageCodec) -> bool:
    return type(keys) is type(values) and _table(keys) is _table(values)


def _table(codec: PageCodec) -> PairTable | None:
    if isinstance(codec, PairCodec | CoarseCodec) and isinstance(codec.table, PairTable):
        return codec.table
    return None


def _entries(codec: PageCodec, device: torch.device) -> PairEntries | UniformLevels | None:
    """Pages that are read by a coarser table are encoded by the whole one."""
    if _is_uniform8(codec):
        return UniformLevels()
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
