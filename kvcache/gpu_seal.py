"""What a GPU's kernel is told of layers whose pages it seals."""

from collections.abc import Mapping

import torch

from anybit.kernels.cuda.seal import LayerRecords, PairEntries
from anybit.kvcache.codec.pages import CoarseCodec, PageCodec, PairCodec
from anybit.kvcache.codec.pairs import PairTable, TreeTable
from anybit.kvcache.sealed import SealedPages


def gpu_records(layers: Mapping[int, SealedPages]) -> LayerRecords | None:
    """Of layers with one format, by number; they have to stay alive. None if they are not ordered pairs on a GPU."""
    first, *_ = layers.values()
    device = first.keys.device
    keys, values = (_pair_entries(codec, device) for codec in first.codecs)
    if device.type != "cuda" or keys is None or values is None:
        return None
    addresses = [[pages.keys.data_ptr(), pages.values.data_ptr()] for pages in layers.values()]
    numbers, places = (torch.tensor(part, dtype=torch.int64, device=device) for part in (list(layers), addresses))
    return LayerRecords(numbers, places, keys, values)


def _pair_entries(codec: PageCodec, device: torch.device) -> PairEntries | None:
    """Pages that are read by a coarser table are encoded by the whole one."""
    if not isinstance(codec, PairCodec | CoarseCodec) or not isinstance(codec.table, PairTable):
        return None
    table = codec.table
    clusters = table.coarse.entries if isinstance(table, TreeTable) else table.entries.mean(0, keepdim=True)
    return PairEntries(*(points.to(device, torch.float32).contiguous() for points in (table.entries, clusters)))
