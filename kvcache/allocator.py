"""Who owns which page: a free list with a count of owners per page."""


class PageAllocator:
    """Hands out page ids 0 .. num_pages−1. Invariant: a page is either free or has at least one owner."""

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners = [0] * num_pages

    @property
    def num_pages(self) -> int:
        return len(self._owners)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def owners(self, page_id: int) -> int:
        return self._owners[page_id]

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one owner each, or None (and nothing taken) when there are not enough."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page_id in pages:
            self._owners[page_id] = 1
        return pages

    def release(self, pages: list[int]) -> None:
        """Give up one ownership of each page; a page without owners is free again. ValueError on a free page."""
        for page_id in pages:
            if self._owners[page_id] == 0:
                raise ValueError(f"Page {page_id} is already free.")
            self._owners[page_id] -= 1
            if self._owners[page_id] == 0:
                self._free.append(page_id)
