"""How many weight bytes the steps have read, per width."""

from collections import Counter
from collections.abc import Iterable, Mapping


class WeightTraffic:
    """Counts from the sizes: a step reads the linears once per width among its rows, and the head if it samples."""

    def __init__(self, linear_bytes: Mapping[int, int], head_bytes: int) -> None:
        """`linear_bytes` maps each served width to the bytes its linears read in one step, head not included."""
        self._linear_bytes = dict(linear_bytes)
        self._head_bytes = head_bytes
        self._read: Counter[int] = Counter()

    @property
    def bit_widths(self) -> frozenset[int]:
        return frozenset(self._linear_bytes)

    @property
    def bytes_read(self) -> dict[int, int]:
        """Bit-width to bytes since the start."""
        return dict(self._read)

    def record_step(self, widths: Iterable[int], used_head: bool) -> None:
        widths = set(widths)
        for width in widths:
            self._read[width] += self._linear_bytes[width]
        if used_head:
            # The head is read once for all widths of the step; charge it to the largest, so that sums stay true.
            self._read[max(widths)] += self._head_bytes
