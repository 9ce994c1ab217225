"""How a sealed page of keys or values lies in memory: one record of bytes per page and KV head.

Codes first, a token after the other, then numbers of a byte per token or channel, then ranges in half precision; records are
multiples of 16 bytes, so that every record's codes can be read in vectors. Within a token's codes, a plane of each code's
high bits comes before a plane of its low bits (`anybit.kvcache.codec.packing`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_TOKENS = 64
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Field:
    """Numbers of one kind in a record."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The fields of a record, in order."""

    fields: tuple[Field, ...]

    @property
    def offsets(self) -> dict[str, int]:
        """Bytes from a record's start to each field."""
        starts, start = {}, 0
        for field in self.fields:
            starts[field.name] = start
            start += field.num_bytes
        return starts

    @property
    def num_bytes(self) -> int:
        """Of a record."""
        used = sum(field.num_bytes for field in self.fields)
        return used + -used % _ALIGNMENT

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Fields [..., *shape] -> records uint8 [..., num_bytes]."""
        first = self.fields[0]
        leading = values[first.name].shape[: -len(first.shape)]
        records = torch.zeros(*leading, self.num_bytes, dtype=torch.uint8, device=values[first.name].device)
        for field, start in zip(self.fields, self.offsets.values(), strict=True):
            flat = values[field.name].reshape(*leading, -1).contiguous()
            records[..., start : start + field.num_bytes] = flat.view(torch.uint8)
        return records

    def unpack(self, records: Tensor) -> dict[str, Tensor]:
        """Inverse of `pack`."""
        leading = records.shape[:-1]
        return {
            field.name: records[..., start : start + field.num_bytes]
            .contiguous()
            .view(field.dtype)
            .view(*leading, *field.shape)
            for field, start in zip(self.fields, self.offsets.values(), strict=True)
        }


def pair_layout(code_bits: int, has_mean: bool, head_dim: int) -> PageLayout:
    """Of ordered pairs with codes of `code_bits` bits and a norm per token; `has_mean`: and the page's mean."""
    fields = [
        Field("codes", torch.uint8, (PAGE_TOKENS, head_dim // 2 * code_bits // 8)),
        Field("norms", torch.uint8, (PAGE_TOKENS,)),
    ]
    if has_mean:
        fields.append(Field("mean", torch.uint8, (head_dim,)))
    fields.append(Field("norm_range", torch.float16, (2,)))
    if has_mean:
        fields.append(Field("mean_range", torch.float16, (2,)))
    return PageLayout(tuple(fields))


def uniform_layout(bits: int, num_ranges: int, head_dim: int) -> PageLayout:
    """Of evenly spaced levels, with a minimum and a step for each of `num_ranges` channels or tokens."""
    return PageLayout(
        (
            Field("codes", torch.uint8, (PAGE_TOKENS, head_dim * bits // 8)),
            Field("minima", torch.uint8, (num_ranges,)),
            Field("steps", torch.uint8, (num_ranges,)),
            Field("minimum_range", torch.float16, (2,)),
            Field("step_range", torch.float16, (2,)),
        )
    )
