"""Which bit-width each row of a batch is computed at."""

from dataclasses import dataclass

from torch import Tensor

WidthSegment = tuple[int, int, int]
"""Rows start .. stop−1 of a batch and the bit-width they are computed at: (bit_width, start, stop)."""


NO_WIDTH = 0
"""Of an n-tile whose rows nobody wants."""

MIXED_ROWS = 16
"""Up to so many rows, each n-tile of 4 has a width of its own; of more, every 16 rows have one."""


@dataclass(frozen=True, slots=True)
class TileWidths:
    """Bit-widths of rows that are computed together: those that may occur, and that of each n-tile of 4 rows."""

    present: tuple[int, ...]
    of_tiles: Tensor  # int64 [n-tiles], on the GPU; NO_WIDTH where there is nothing to compute
