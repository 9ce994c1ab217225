"""How many weight bytes the steps have read, per width."""

from collections import Counter
from collections.abc import Iterable, Mapping


class WeightTraffic:
    """Counts from the sizes: a step reads the linears once per width among its rows, and the head if it samples.

    Where all widths share one pass, it reads the codes of the widest and everybody's float parts.
    """

    def __init__(self, linear_bytes: Mapping[int, int], part_bytes: Mapping[int, int], head_bytes: int) -> None:
        """Both map each served width to what its linears read in one step, head not included: in all, and of float parts."""
        self._linear_bytes = dict(linear_bytes)
        self._part_bytes = dict(part_bytes)
        self._head_bytes = head_bytes
        self._read: Counter[int] = Counter()

    def from_zero(self) -> "WeightTraffic":
        """The same sizes, with nothing counted."""
        return WeightTraffic(self._linear_bytes, self._part_bytes, self._head_bytes)

    @property
    def bit_widths(self) -> frozenset[int]:
        return frozenset(self._linear_bytes)

    @property
    def bytes_read(self) -> dict[int, int]:
        """Bit-width to bytes since the start."""
        return dict(self._read)

    def record_step(self, widths: Iterable[int], used_head: bool, in_one_pass: bool = False) -> None:
        widths = set(widths)
        for width in widths:
            read = self._part_bytes if in_one_pass and width < max(widths) else self._linear_bytes
            self._read[width] += read[width]
        if used_head:
            # The head is read once for all widths of the step; charge it to the largest, so that sums stay true.
            self._read[max(widths)] += self._head_bytes
