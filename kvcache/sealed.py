"""One layer's sealed pages: records of codes, and the exact beginnings of sequences in records of the same size."""

import torch
from torch import Tensor

from anybit.kvcache.codec.pages import PageCodec
from anybit.kvcache.formats import TAIL_DTYPE, KVFormat, codec_of
from anybit.kvcache.memory import zeroed


class SealedPages:
    """Pages of a sealed format, per page and KV head a record of keys and one of values.

    Vectors are in the basis of the pages (`codec.balance.PageBasis`) where the format has one.
    """

    def __init__(
        self, kv_format: KVFormat, num_pages: int, num_kv_heads: int, head_dim: int, device: torch.device | str = "cpu"
    ) -> None:
        key_bytes, value_bytes = kv_format.record_bytes(head_dim)
        self.exact_tokens = kv_format.exact_tokens(head_dim)
        self.keys = zeroed((num_pages, num_kv_heads, key_bytes), torch.uint8, device)
        self.values = zeroed((num_pages, num_kv_heads, value_bytes), torch.uint8, device)
        self._head_dim = head_dim
        self.codecs = codec_of(kv_format.keys, True), codec_of(kv_format.values, False)

    def seal(self, page_ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Encode whole pages: page_ids int64 [pages]; keys, values [pages, kv_heads, 64, head_dim]."""
        self.store(page_ids, *self.encode(keys, values))

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Records of whole pages, [..., 64, head_dim] -> uint8 [..., bytes], of any layer with this format.

        Pages with numbers that are not finite are read back as not-a-number.
        """
        encoded = (_encoded(codec, rows) for codec, rows in zip(self.codecs, (keys, values), strict=True))
        key_records, value_records = encoded
        return key_records, value_records

    def store(self, page_ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep records [pages, kv_heads, bytes] in pages int64 [pages]."""
        self.keys[page_ids], self.values[page_ids] = keys, values

    def read(self, page_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of pages, float32 [..., kv_heads, 64, head_dim] for int64 [...]."""
        keys, values = (
            codec.decode(codec.layout(self._head_dim).unpack(records[page_ids]))
            for records, codec in zip(self._records, self.codecs, strict=True)
        )
        return keys, values

    def keep_exactly(self, page_ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep the first tokens of sequences' first pages [pages, kv_heads, 64, head_dim] in pages of their own."""
        for records, rows in zip(self._records, (keys, values), strict=True):
            kept = rows[:, :, : self.exact_tokens].to(TAIL_DTYPE).contiguous().view(torch.uint8).flatten(2)
            records[page_ids, :, : kept.shape[2]] = kept

    def read_exactly(self, page_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What `keep_exactly` kept: float32 [..., kv_heads, exact_tokens, head_dim] for int64 [...]."""
        num_bytes = self.exact_tokens * self._head_dim * TAIL_DTYPE.itemsize
        keys, values = (
            records[page_ids][..., :num_bytes]
            .contiguous()
            .view(TAIL_DTYPE)
            .view(*page_ids.shape, records.shape[1], self.exact_tokens, self._head_dim)
            .float()
            for records in self._records
        )
        return keys, values

    @property
    def _records(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


def _encoded(codec: PageCodec, rows: Tensor) -> Tensor:
    is_finite = torch.isfinite(rows).flatten(-2).all(-1)
    # Codes of zeros would stand for zeros whatever the ranges say.
    fields = codec.encode(rows.float().masked_fill(~is_finite[..., None, None], 1.0))
    ranges = {
        name: part.masked_fill(~is_finite[..., None], torch.nan)
        for name, part in fields.items()
        if part.dtype.is_floating_point
    }
    return codec.layout(rows.shape[-1]).pack({**fields, **ranges})
