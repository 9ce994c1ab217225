"""Codecs of whole pages: what the serving formats store of a page's keys or values, and how exactly it is read back.

All take float32 [..., tokens, head_dim], one page of one KV head per leading index. A page's fields are packed as they
are stored, so that the bits of a format are those of its fields and of nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from anybit.kernels.page_layout import PAGE_TOKENS, PageLayout, pair_layout, uniform_layout
from anybit.kvcache.codec.metadata import decode_linear, decode_log, encode_linear, encode_log
from anybit.kvcache.codec.packing import pack_codes, unpack_codes
from anybit.kvcache.codec.pairs import Table, TreeTable

PageFields = Mapping[str, Tensor]
"""What is stored of pages, by name: uint8 and float16 [..., bytes or numbers]."""


class PageCodec(Protocol):
    """Encodes and decodes pages; the oracle of every kernel that writes or reads them."""

    def encode(self, rows: Tensor) -> PageFields:
        """ValueError if a number is not finite."""

    def decode(self, fields: PageFields) -> Tensor:
        """float32 [..., tokens, head_dim]."""

    def layout(self, head_dim: int) -> PageLayout:
        """Of the fields in memory."""


def stored_bits(fields: PageFields, num_elements: int) -> float:
    """Bits an element, all fields counted."""
    return 8 * sum(field.numel() * field.element_size() for field in fields.values()) / num_elements


@dataclass(frozen=True, slots=True)
class PairCodec:
    """QET's serving form of rotated rows: less the page's mean, over the token's norm, ordered pairs, clustered.

    `has_mean` for keys, whose mean over a page is large and says little; values have none worth its bits. The norm of a
    token is the least-squares one for the clusters that were chosen.
    """

    table: Table
    has_mean: bool

    def encode(self, rows: Tensor) -> PageFields:
        _require_finite(rows)
        rows = rows.to(torch.float32)
        fields: dict[str, Tensor] = {}
        if self.has_mean:
            fields["mean"], fields["mean_range"] = encode_linear(rows.mean(-2))
            rows = rows - decode_linear(fields["mean"], fields["mean_range"])[..., None, :]
        size = rows.square().mean(-1).sqrt()
        codes = self.table.encode(rows / torch.where(size > 0, size, 1.0)[..., None])
        levels = self.table.decode(codes)
        norms = ((rows * levels).sum(-1) / levels.square().sum(-1)).clamp_min(0.0)
        fields["norms"], fields["norm_range"] = encode_log(norms)
        fields["codes"] = pack_codes(codes, self.table.bits)
        return fields

    def layout(self, head_dim: int) -> PageLayout:
        return pair_layout(self.table.bits, self.has_mean, head_dim)

    def decode(self, fields: PageFields) -> Tensor:
        return _decode_pairs(self.table, unpack_codes(fields["codes"], self.table.bits), fields)


@dataclass(frozen=True, slots=True)
class CoarseCodec:
    """Reads pages that have a tree of codebooks by the coarser codebook alone."""

    table: TreeTable
    has_mean: bool

    def encode(self, rows: Tensor) -> PageFields:
        return PairCodec(self.table, self.has_mean).encode(rows)

    def layout(self, head_dim: int) -> PageLayout:
        return pair_layout(self.table.bits, self.has_mean, head_dim)

    @property
    def levels(self) -> Tensor:
        """What each code of the finer table is read as: float32 [2^bits, 2]."""
        coarse = self.table.coarse
        return coarse.levels[torch.arange(1 << self.table.bits) >> (self.table.bits - coarse.bits)]

    def decode(self, fields: PageFields) -> Tensor:
        coarse = self.table.coarse
        codes = unpack_codes(fields["codes"], self.table.bits) >> (self.table.bits - coarse.bits)
        return _decode_pairs(coarse, codes, fields)


@dataclass(frozen=True, slots=True)
class UniformCodec:
    """Evenly spaced levels between the least and the largest element of each channel of a page, or of each token.

    Minimum and step are a byte each: the minimum linear, the step logarithmic, both with a range per page.
    """

    bits: int
    per: Literal["channel", "token"]

    def encode(self, rows: Tensor) -> PageFields:
        _require_finite(rows)
        rows = rows.to(torch.float32)
        low, high = rows.aminmax(dim=self._reduced)
        minima, minimum_range = encode_linear(low)
        low = decode_linear(minima, minimum_range)
        steps, step_range = encode_log((high - low).clamp_min(0) / ((1 << self.bits) - 1))
        step = decode_log(steps, step_range)
        offset = (rows - low.unsqueeze(self._reduced)) / torch.where(step > 0, step, 1.0).unsqueeze(self._reduced)
        codes = offset.round_().clamp_(0, (1 << self.bits) - 1).to(torch.uint8)
        return {
            "minima": minima,
            "minimum_range": minimum_range,
            "steps": steps,
            "step_range": step_range,
            "codes": pack_codes(codes, self.bits),
        }

    def layout(self, head_dim: int) -> PageLayout:
        return uniform_layout(self.bits, head_dim if self.per == "channel" else PAGE_TOKENS, head_dim)

    def decode(self, fields: PageFields) -> Tensor:
        codes = unpack_codes(fields["codes"], self.bits).to(torch.float32)
        low = decode_linear(fields["minima"], fields["minimum_range"]).unsqueeze(self._reduced)
        step = decode_log(fields["steps"], fields["step_range"]).unsqueeze(self._reduced)
        return codes * step + low

    @property
    def _reduced(self) -> int:
        return -2 if self.per == "channel" else -1


def _decode_pairs(table: Table, codes: Tensor, fields: PageFields) -> Tensor:
    rows = table.decode(codes) * decode_log(fields["norms"], fields["norm_range"])[..., None]
    if "mean" in fields:
        rows = rows + decode_linear(fields["mean"], fields["mean_range"])[..., None, :]
    return rows


def _require_finite(rows: Tensor) -> None:
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("Keys or values that are not finite cannot be compressed.")
