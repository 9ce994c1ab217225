"""Exact pages that sequences of sealed formats write in until a page is full."""

from anybit.kvcache.spec import PAGE_SIZE


class OwnSlots:
    """Hands out ids `first` .. `first + count - 1`; there are enough for whatever a step can hold."""

    def __init__(self, first: int = 0, count: int = 0) -> None:
        self._free = list(range(first + count - 1, first - 1, -1))
        self.count = count

    @property
    def num_used(self) -> int:
        return self.count - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """RuntimeError when there are not as many: a bug, as steps are bounded."""
        if count > len(self._free):
            raise RuntimeError(f"{count} slots were asked for and {len(self._free)} are free.")
        return [self._free.pop() for _ in range(count)]

    def release(self, slots: list[int]) -> None:
        self._free += slots


def slots_needed(max_num_seqs: int, max_step_tokens: int) -> int:
    """Enough for a step's tokens wherever they lie in their pages, and for the page that each sequence has begun."""
    return max_step_tokens // PAGE_SIZE + 2 * max_num_seqs
