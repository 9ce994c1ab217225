"""Formats of keys and values that AnyBit does not serve, as codecs of pages, for comparison at equal bits."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anybit.kvcache.codec.clustering import cluster, nearest
from anybit.kvcache.codec.packing import pack_codes, unpack_codes
from anybit.kvcache.codec.pages import PageFields

_ITERATIONS = 60


@dataclass(frozen=True, slots=True)
class FreeTable:
    """Clusters of adjacent elements in no order, [clusters, size]: Lloyd-Max, or k-means of pairs without reordering."""

    entries: Tensor

    @property
    def bits(self) -> int:
        return (len(self.entries) - 1).bit_length()

    def encode(self, values: Tensor) -> Tensor:
        codes = nearest(values.reshape(-1, self.entries.shape[1]), self.entries)[0]
        return codes.to(torch.uint8).view(*values.shape[:-1], -1)

    def decode(self, codes: Tensor) -> Tensor:
        return self.entries[codes.long()].flatten(-2)


def gaussian_table(size: int, bits: int) -> FreeTable:
    """Clustered on normalised Gaussian vectors, as the universal codebooks are."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1 << 12, 128, generator=generator)
    vectors *= 128**0.5 / vectors.norm(dim=1, keepdim=True)
    return FreeTable(cluster(vectors.view(-1, size), 1 << bits, _ITERATIONS, generator))


@dataclass(frozen=True, slots=True)
class GroupCodec:
    """KIVI (arXiv 2402.02750): groups between least and largest element, along tokens for keys and channels for values."""

    bits: int
    along: Literal["tokens", "channels"]
    group: int = 32

    def encode(self, rows: Tensor) -> PageFields:
        oriented = rows.transpose(-1, -2) if self.along == "tokens" else rows
        groups = oriented.unflatten(-1, (-1, self.group))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        low = low.half()
        step = ((high - low.float()) / ((1 << self.bits) - 1)).half()
        codes = ((groups - low.float()) / step.float().clamp_min(1e-12)).round().clamp(0, (1 << self.bits) - 1)
        return {"low": low, "step": step, "codes": pack_codes(codes.to(torch.uint8), self.bits)}

    def decode(self, fields: PageFields) -> Tensor:
        codes = unpack_codes(fields["codes"], self.bits).float()
        oriented = (codes * fields["step"].float() + fields["low"].float()).flatten(-2)
        return oriented.transpose(-1, -2) if self.along == "tokens" else oriented


@dataclass(frozen=True, slots=True)
class BlockCodec:
    """llama.cpp's q4_0: blocks of channels of a token, over the element of largest size, which becomes −8."""

    block: int = 32

    def encode(self, rows: Tensor) -> PageFields:
        blocks = rows.unflatten(-1, (-1, self.block))
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = (largest / -8).half()
        divisor = torch.where(scale == 0, 1.0, scale.float())
        codes = (blocks / divisor + 8.5).floor().clamp(0, 15)
        return {"scale": scale, "codes": pack_codes(codes.to(torch.uint8), 4)}

    def decode(self, fields: PageFields) -> Tensor:
        return ((unpack_codes(fields["codes"], 4).float() - 8) * fields["scale"].float()).flatten(-2)
