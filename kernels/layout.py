"""The bit layout of the nested code: the only module that knows where a bit lies (FORMATS, section 1).

Every weight has one 8-bit code q = 16·hi + lo. Its bits are stored in five chunk streams, most significant first:

    c2 (bits 7,6) · c3 (bit 5) · c4 (bit 4) · c6 (bits 3,2) · c8 (bits 1,0)

so that a read at width r touches the streams up to c_r and no further: exactly r/8 of the code bytes.

Canonical order (what checkpoints store). A chunk stream is a uint8 matrix [rows·bits/8, in]: byte (i, j) holds
column j of the `8/bits` consecutive rows from i·8/bits on, the first of them in the byte's highest bits. Unpacking is
then a shift and a mask over contiguous memory at any word size; columns can be sliced anywhere, and rows sliced or
concatenated at multiples of 8, without repacking. Rows are padded with zero codes to a multiple of ROW_BLOCK = 8.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CODE_BITS = 8
NIBBLE_BITS = 4
ROW_BLOCK = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stream: `bits` bits of every code, the lowest of them at bit `shift` of the 8-bit code."""

    name: str
    bits: int
    shift: int

    @property
    def codes_per_byte(self) -> int:
        return CODE_BITS // self.bits

    @property
    def mask(self) -> int:
        return (1 << self.bits) - 1

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the packed stream of an [out, in] weight."""
        return padded_rows(out_features) // self.codes_per_byte, in_features


CHUNKS = (Chunk("c2", 2, 6), Chunk("c3", 1, 5), Chunk("c4", 1, 4), Chunk("c6", 2, 2), Chunk("c8", 2, 0))
BIT_WIDTHS = (2, 3, 4, 6, 8)
GROUP_SIZES = (128, 64, 32)


def chunks_for(bit_width: int) -> tuple[Chunk, ...]:
    """The streams that a read at `bit_width` touches, most significant first. ValueError if it is not a served width."""
    if bit_width not in BIT_WIDTHS:
        raise ValueError(f"Bit-width {bit_width} is not one of {', '.join(map(str, BIT_WIDTHS))}.")
    return tuple(chunk for chunk in CHUNKS if chunk.shift >= CODE_BITS - bit_width)


def nibble_chunks(bit_width: int) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """`chunks_for(bit_width)` split into the streams of the high nibble and those of the low nibble."""
    chunks = chunks_for(bit_width)
    hi = tuple(chunk for chunk in chunks if chunk.shift >= NIBBLE_BITS)
    return hi, chunks[len(hi) :]


def padded_rows(out_features: int) -> int:
    """Rows stored for `out_features` rows: the next multiple of ROW_BLOCK."""
    return out_features + -out_features % ROW_BLOCK


def code_bytes(out_features: int, in_features: int, bit_width: int) -> int:
    """Bytes of codes that one pass over an [out, in] weight reads at `bit_width`: r/8 of a byte a (padded) weight."""
    return padded_rows(out_features) * in_features * bit_width // CODE_BITS


def num_float_parts(bit_width: int) -> int:
    """Numbers of the float part that a read at `bit_width` uses per (row, group): s, z; above 4 bits s_4, t, z."""
    return 2 if bit_width <= NIBBLE_BITS else 3


def auto_group_size(in_features: int) -> int:
    """The largest of 128, 64, 32 that divides `in_features`; ValueError if none does."""
    for group_size in GROUP_SIZES:
        if in_features % group_size == 0:
            return group_size
    raise ValueError(f"An input size of {in_features} is not a multiple of 32, the smallest group.")


def pack_chunk(codes: Tensor, chunk: Chunk) -> Tensor:
    """Take one chunk's bits out of full 8-bit codes: uint8 [out, in] -> uint8 [padded_rows(out)·bits/8, in]."""
    out_features, in_features = codes.shape
    fields = F.pad((codes >> chunk.shift) & chunk.mask, (0, 0, 0, padded_rows(out_features) - out_features))
    fields = fields.view(-1, chunk.codes_per_byte, in_features)
    packed = torch.zeros_like(fields[:, 0])
    for position, shift in enumerate(_shifts(chunk)):
        packed |= fields[:, position] << shift
    return packed


def unpack_chunk(packed: Tensor, chunk: Chunk) -> Tensor:
    """Inverse of `pack_chunk`, padding rows included: the chunk's field of every code, uint8 [padded rows, in]."""
    return torch.stack([(packed >> shift) & chunk.mask for shift in _shifts(chunk)], dim=1).flatten(0, 1)


def pack(codes: Tensor) -> dict[str, Tensor]:
    """Split 8-bit codes, uint8 [out, in], into the five chunk streams by name."""
    return {chunk.name: pack_chunk(codes, chunk) for chunk in CHUNKS}


def unpack(chunks: Mapping[str, Tensor], bit_width: int) -> Tensor:
    """The top `bit_width` bits of every code as integers 0 .. 2^r − 1, uint8 [padded rows, in]; no other stream is read."""
    first, *rest = chunks_for(bit_width)
    codes = unpack_chunk(chunks[first.name], first)
    for chunk in rest:
        codes = (codes << chunk.bits) | unpack_chunk(chunks[chunk.name], chunk)
    return codes


def unpack_words(packed: Tensor, chunk: Chunk) -> Tensor:
    """`unpack_chunk` eight bytes at a time: int64 [packed rows, codes per byte, in/8], the fields as bytes of words.

    The mask is the same in every byte of a word, so bits that a shift moves across a byte are masked off. Fields can
    be combined with `<<` and `|` as words; `.view(torch.uint8)` then gives the codes in row order.
    """
    words = packed.view(torch.int64).unsqueeze(1)
    return (words >> _shift_tensor(chunk, packed.device)).bitwise_and_(chunk.mask * _BYTE_ONES)


def gather_rows(packed: Tensor, chunk: Chunk, row_ids: Tensor) -> Tensor:
    """The chunk's field of the given rows: int64 [n] -> uint8 [n, in]. Reads only the bytes that hold those rows."""
    shifts = _shift_tensor(chunk, packed.device).view(-1).to(torch.uint8)
    return (packed[row_ids // chunk.codes_per_byte] >> shifts[row_ids % chunk.codes_per_byte, None]) & chunk.mask


def _shifts(chunk: Chunk) -> tuple[int, ...]:
    """How far right each code of a byte must move to reach bit 0, first row first."""
    return tuple(CODE_BITS - chunk.bits * (position + 1) for position in range(chunk.codes_per_byte))


@functools.cache
def _shift_tensor(chunk: Chunk, device: torch.device) -> Tensor:
    return torch.tensor(_shifts(chunk), dtype=torch.int64, device=device).view(1, -1, 1)


_BYTE_ONES = 0x0101010101010101
