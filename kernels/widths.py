"""Which bit-width each row of a batch is computed at."""

from dataclasses import dataclass

from torch import Tensor

WidthSegment = tuple[int, int, int]
"""Rows start .. stop−1 of a batch and the bit-width they are computed at: (bit_width, start, stop)."""


NO_WIDTH = 0
"""Of a row that nobody wants."""

MIXED_ROWS = 16
"""Of up to so many rows as fixed point numbers, 4 side by side have one width; of more, 16."""


@dataclass(frozen=True, slots=True)
class RowWidths:
    """Bit-widths of rows that are computed together: those that may occur, and each row's."""

    present: tuple[int, ...]
    of_rows: Tensor  # int64 [rows, those included that pad the last n-tiles of a pass], on the GPU; or NO_WIDTH
