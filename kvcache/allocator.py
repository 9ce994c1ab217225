"""Who owns which page: a free list, a count of owners per page, and the pages kept for what they hold."""

from collections import OrderedDict
from collections.abc import Iterable

from anybit.kvcache.prefix import PrefixIndex


class PageAllocator:
    """Hands out page ids 0 .. num_pages−1.

    Invariant: a page is free, or owned at least once, or cached. A cached page has no owner but content that `index`
    can find; it is taken for something else when no page is free, the one given up longest ago first.
    """

    def __init__(self, num_pages: int, index: PrefixIndex | None = None) -> None:
        self.index = PrefixIndex() if index is None else index
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._owners = [0] * num_pages

    @property
    def num_pages(self) -> int:
        return len(self._owners)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out."""
        return self.num_free + self.num_cached

    @property
    def num_used(self) -> int:
        """Pages with an owner."""
        return self.num_pages - self.num_available

    def owners(self, page_id: int) -> int:
        return self._owners[page_id]

    def is_cached(self, page_id: int) -> bool:
        return page_id in self._cached

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one owner each, or None (and nothing taken) when there are not enough."""
        if count > self.num_available:
            return None
        pages = [self._take() for _ in range(count)]
        for page_id in pages:
            self._owners[page_id] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one owner to each of these owned or cached pages. ValueError on a free page."""
        for page_id in pages:
            if self._owners[page_id] == 0:
                if page_id not in self._cached:
                    raise ValueError(f"Page {page_id} is free and holds nothing.")
                del self._cached[page_id]
            self._owners[page_id] += 1

    def release(self, pages: list[int]) -> None:
        """Give up one ownership of each page of a sequence, in the sequence's order. ValueError on a page without owner.

        The last pages are forgotten first: a page is of no use once the one before it is gone.
        """
        for page_id in reversed(pages):
            if self._owners[page_id] == 0:
                raise ValueError(f"Page {page_id} has no owner.")
            self._owners[page_id] -= 1
            if self._owners[page_id] == 0:
                if page_id in self.index:
                    self._cached[page_id] = None
                else:
                    self._free.append(page_id)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        page_id, _ = self._cached.popitem(last=False)
        self.index.discard(page_id)
        return page_id
