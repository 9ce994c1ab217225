"""Formats of keys and values by name: what a user asks for, what a page of it stores and what it costs.

A name is one format for keys and values ("qet4"), or two ("qet4/qet3": keys, then values). Pages of exact formats stay as
they are written. Others are sealed once they are full; only a sequence's first tokens and a query's own page are exact then.
"""

import functools
from dataclasses import dataclass

import torch

from anybit.kernels.page_layout import PAGE_TOKENS as PAGE_SIZE
from anybit.kvcache.codec.pages import CoarseCodec, PageCodec, PairCodec, UniformCodec
from anybit.kvcache.codec.universal import tree_table, universal_table

EXACT_FORMATS = {"bf16": torch.bfloat16, "float32": torch.float32}
SEALED_FORMATS = (
    "qet4",
    "qet3",
    "qet2",
    "qet2+2",
    "qet2+2@2",
    "uniform8",
    "uniform4",
    "uniform3",
    "uniform2",
)
"""`qet2+2` is two bits and a clustered residual of two more; `qet2+2@2` reads such pages by the first two alone."""
MAX_EXACT_TOKENS = 16
"""First tokens of a sequence that are kept exactly, if a page of the format has room for them."""
TAIL_DTYPE = torch.bfloat16
"""Of what sealed formats keep exactly."""
_EXACT_MULTIPLE = 4


@dataclass(frozen=True, slots=True)
class KVFormat:
    """Names of the formats of keys and of values; both exact, and then equal, or both sealed."""

    keys: str
    values: str

    @property
    def name(self) -> str:
        return self.keys if self.keys == self.values else f"{self.keys}/{self.values}"

    @property
    def names(self) -> tuple[str, str]:
        return self.keys, self.values

    @property
    def is_exact(self) -> bool:
        return self.keys in EXACT_FORMATS

    def record_bytes(self, head_dim: int) -> tuple[int, int]:
        """Of one KV head's keys and of its values in one page."""
        if self.is_exact:
            exact = PAGE_SIZE * head_dim * EXACT_FORMATS[self.keys].itemsize
            return exact, exact
        return _sealed_bytes(self.keys, True, head_dim), _sealed_bytes(self.values, False, head_dim)

    def exact_tokens(self, head_dim: int) -> int:
        """First tokens of a sequence that one page more, of the size of the sealed ones, keeps exactly."""
        if self.is_exact:
            return 0
        room = min(self.record_bytes(head_dim)) // (head_dim * TAIL_DTYPE.itemsize)
        return min(MAX_EXACT_TOKENS, room - room % _EXACT_MULTIPLE)

    def sequence_bytes(self, num_tokens: int, head_dim: int) -> int:
        """Of one KV head of a sequence: all pages, its exact first tokens, and the page that it is writing."""
        pages, page_bytes = -(-num_tokens // PAGE_SIZE), sum(self.record_bytes(head_dim))
        if self.is_exact:
            return pages * page_bytes
        return (pages + 1) * page_bytes + 2 * PAGE_SIZE * head_dim * TAIL_DTYPE.itemsize


def parse_format(name: str) -> KVFormat:
    """ValueError, in one sentence, if there is no such format."""
    keys, _, values = name.partition("/")
    values = values or keys
    known = (*EXACT_FORMATS, *SEALED_FORMATS)
    for part in (keys, values):
        if part not in known:
            raise ValueError(f"{part!r} is not a KV format; there are {', '.join(known)}.")
    if (keys in EXACT_FORMATS or values in EXACT_FORMATS) and keys != values:
        raise ValueError(f"Keys as {keys} and values as {values} do not go together: exact formats are for both.")
    return KVFormat(keys, values)


def is_exact(name: str) -> bool:
    """Whether pages of this format stay as they are written."""
    return name in EXACT_FORMATS


def codec_of(name: str, for_keys: bool) -> PageCodec:
    """What encodes and decodes pages of a sealed format."""
    if name.startswith("uniform"):
        return UniformCodec(int(name.removeprefix("uniform")), "channel" if for_keys else "token")
    if name == "qet2+2":
        return PairCodec(tree_table(), has_mean=for_keys)
    if name == "qet2+2@2":
        return CoarseCodec(tree_table(), has_mean=for_keys)
    return PairCodec(universal_table(2 * int(name.removeprefix("qet"))), has_mean=for_keys)


def is_rotated(name: str) -> bool:
    """Whether pages of a sealed format hold rotated vectors (`codec.balance.PageBasis`)."""
    return name.startswith("qet")


@functools.cache
def _sealed_bytes(name: str, for_keys: bool, head_dim: int) -> int:
    return codec_of(name, for_keys).layout(head_dim).num_bytes
