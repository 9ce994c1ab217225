"""Formats of keys and values that AnyBit does not serve, as codecs of pages, for comparison at equal bits."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anybit.kernels.page_layout import PAGE_TOKENS, Field, PageLayout
from anybit.kvcache.codec.clustering import cluster, nearest
from anybit.kvcache.codec.packing import pack_codes, unpack_codes
from anybit.kvcache.codec.pages import PageFields
from anybit.kvcache.codec.pairs import PairTable
from anybit.kvcache.codec.qet_matrix import reorder, restore

REFINING_ITERATIONS = 20
_ITERATIONS = 60
_LARGEST_ENTRY = 127  # in steps


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


@dataclass(frozen=True, slots=True)
class SwappedTable:
    """QET's layers as published, on a token: after them a pair of columns lies among smaller elements or among larger.

    `entries` [2^layers, clusters, 2] are the clusters of each part. A code is a cluster and, below it, the swap bits that
    stand at the same place of their layers.
    """

    entries: Tensor

    @property
    def num_layers(self) -> int:
        return len(self.entries).bit_length() - 1

    @property
    def bits(self) -> int:
        return (self.entries.shape[1] - 1).bit_length() + self.num_layers

    def encode(self, values: Tensor) -> Tensor:
        ordered, swaps = reorder(values.reshape(-1, values.shape[-1]), self.num_layers)
        parts = ordered.view(len(ordered), len(self.entries), -1, 2)
        codes = torch.stack(
            [
                nearest(parts[:, part].reshape(-1, 2), entries)[0].view(len(ordered), -1)
                for part, entries in enumerate(self.entries)
            ],
            dim=1,
        ).flatten(1)
        for swap in swaps:
            codes = codes << 1 | swap
        return codes.to(torch.uint8).view(*values.shape[:-1], -1)

    def decode(self, codes: Tensor) -> Tensor:
        rows = codes.reshape(-1, codes.shape[-1]).long()
        swaps = [(rows >> layer & 1).bool() for layer in reversed(range(self.num_layers))]
        clusters = (rows >> self.num_layers).view(len(rows), len(self.entries), -1)
        ordered = torch.stack([entries[clusters[:, part]] for part, entries in enumerate(self.entries)], dim=1)
        return restore(ordered.flatten(1), swaps).view(*codes.shape[:-1], -1)


def gaussian_table(size: int, bits: int) -> FreeTable:
    """Clustered on normalised Gaussian vectors, as the universal codebooks are."""
    generator = torch.Generator().manual_seed(0)
    return FreeTable(cluster(_vectors(generator).view(-1, size), 1 << bits, _ITERATIONS, generator))


def in_pairs(levels: FreeTable) -> FreeTable:
    """The same levels of single elements as a table of pairs, which pages have codes of."""
    return FreeTable(torch.cartesian_prod(levels.entries[:, 0], levels.entries[:, 0]))


def swapped_table(num_layers: int, bits: int) -> SwappedTable:
    """Clustered on the same vectors; `bits` a pair, those of its swaps included."""
    generator = torch.Generator().manual_seed(0)
    ordered, _ = reorder(_vectors(generator), num_layers)
    parts = ordered.view(len(ordered), 1 << num_layers, -1, 2).transpose(0, 1).flatten(1, 2)
    count = 1 << (bits - num_layers)
    return SwappedTable(torch.stack([cluster(part, count, _ITERATIONS, generator) for part in parts]))


def ordered_pairs(vectors: Tensor) -> Tensor:
    """Of vectors [..., head_dim] over their size, as tables of ordered pairs are searched: [pairs, 2]."""
    pairs = (vectors / vectors.square().mean(-1, keepdim=True).sqrt()).reshape(-1, 2)
    return torch.stack((pairs.amax(1), pairs.amin(1)), dim=1)


def refined(table: PairTable, points: Tensor) -> PairTable:
    """Lloyd's algorithm from the table's entries on ordered pairs [pairs, 2]; rounded as the universal entries are."""
    entries = table.entries
    for _ in range(REFINING_ITERATIONS):
        labels, _ = nearest(points, entries)
        counts = torch.bincount(labels, minlength=len(entries))[:, None]
        sums = torch.zeros_like(entries).index_add_(0, labels, points)
        entries = torch.where(counts > 0, sums / counts.clamp_min(1), entries)
    step = entries.abs().max() / _LARGEST_ENTRY
    return PairTable((entries / step).round() * step)


def _vectors(generator: torch.Generator) -> Tensor:
    vectors = torch.randn(1 << 12, 128, generator=generator)
    return vectors * 128**0.5 / vectors.norm(dim=1, keepdim=True)


@dataclass(frozen=True, slots=True)
class GroupCodec:
    """KIVI (arXiv 2402.02750): groups between least and largest element, along tokens for keys and channels for values."""

    bits: int
    along: Literal["tokens", "channels"]
    group: int = 32

    def encode(self, rows: Tensor) -> PageFields:
        oriented = rows.transpose(-1, -2) if self.along == "tokens" else rows
        groups = oriented.unflatten(-1, (-1, self.group))
        low, high = groups.aminmax(dim=-1)
        low = low.half()
        step = ((high - low.float()) / ((1 << self.bits) - 1)).half()
        offset = (groups - low.float()[..., None]) / step.float().clamp_min(1e-12)[..., None]
        codes = offset.round().clamp(0, (1 << self.bits) - 1).to(torch.uint8)
        return {"low": low.flatten(-2), "step": step.flatten(-2), "codes": pack_codes(codes.flatten(-2), self.bits)}

    def layout(self, head_dim: int) -> PageLayout:
        num_groups = PAGE_TOKENS * head_dim // self.group
        lines = (head_dim, PAGE_TOKENS) if self.along == "tokens" else (PAGE_TOKENS, head_dim)
        return PageLayout(
            (
                Field("codes", torch.uint8, (lines[0], lines[1] * self.bits // 8)),
                Field("low", torch.float16, (num_groups,)),
                Field("step", torch.float16, (num_groups,)),
            )
        )

    def decode(self, fields: PageFields) -> Tensor:
        codes = unpack_codes(fields["codes"], self.bits).float().unflatten(-1, (-1, self.group))
        low, step = (fields[name].float().view(codes.shape[:-1])[..., None] for name in ("low", "step"))
        oriented = (codes * step + low).flatten(-2)
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
        codes = (blocks / divisor + 8.5).floor().clamp(0, 15).to(torch.uint8)
        return {"scale": scale.flatten(-3), "codes": pack_codes(codes.flatten(-2), 4)}

    def layout(self, head_dim: int) -> PageLayout:
        return PageLayout(
            (
                Field("codes", torch.uint8, (PAGE_TOKENS, head_dim // 2)),
                Field("scale", torch.float16, (PAGE_TOKENS * head_dim // self.block,)),
            )
        )

    def decode(self, fields: PageFields) -> Tensor:
        codes = unpack_codes(fields["codes"], 4).float().unflatten(-1, (-1, self.block))
        return ((codes - 8) * fields["scale"].float().view(codes.shape[:-1])[..., None]).flatten(-2)


@dataclass(frozen=True, slots=True)
class ExactCodec:
    """Pages as they were written: what a comparison of formats shows where no format is at work."""

    def encode(self, rows: Tensor) -> PageFields:
        return {"rows": rows.bfloat16().flatten(-2)}

    def layout(self, head_dim: int) -> PageLayout:
        return PageLayout((Field("rows", torch.bfloat16, (PAGE_TOKENS * head_dim,)),))

    def decode(self, fields: PageFields) -> Tensor:
        return fields["rows"].float().unflatten(-1, (PAGE_TOKENS, -1))
