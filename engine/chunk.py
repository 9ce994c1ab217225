"""Pieces of sequences that a step computes, and which of them belong together."""

from collections.abc import Iterator
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass

from anybit.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` pending tokens of a sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether the sequence's newest token is among them, so that the next one can be sampled."""
        return self.num_tokens == self.sequence.num_pending


def by_width(chunks: ReadOnly[Chunk]) -> dict[int, list[Chunk]]:
    """Chunks by the bit-width that their rows are computed at, narrow ones first, each in the order given.

    Who asked for at least some width is lifted to the widest that a chunk of the step needs.
    """
    widest = max((chunk.sequence.bit_width for chunk in chunks), default=0)
    found: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        precision = chunk.sequence.request.precision
        found.setdefault(widest if precision.at_least else precision.bit_width, []).append(chunk)
    return dict(sorted(found.items()))


PlacedChunk = tuple[Chunk, int]
"""A chunk and its first row."""


def attended_together(placed: ReadOnly[PlacedChunk]) -> Iterator[tuple[int, list[PlacedChunk]]]:
    """Chunks with as many tokens as each other, and how many; long ones alone, for they would pad each other's history."""
    by_length: dict[int, list[PlacedChunk]] = {}
    for chunk, row in placed:
        by_length.setdefault(chunk.num_tokens, []).append((chunk, row))
    for num_tokens, members in by_length.items():
        for part in [members] if num_tokens == 1 else [[member] for member in members]:
            yield num_tokens, part
