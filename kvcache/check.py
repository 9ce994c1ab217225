"""Invariants of the cache, checked whenever the engine is idle and after every test."""

from collections import Counter
from collections.abc import Iterable

from anybit.kvcache.allocator import PageAllocator


class IntegrityError(RuntimeError):
    """Pages and their owners disagree: a bug, never a user's doing."""


def check_integrity(allocator: PageAllocator, tables: Iterable[list[int]]) -> None:
    """Raise IntegrityError unless every page is owned exactly as often as the live block tables name it.

    Pages without an owner must be free, or cached and known to its index.
    """
    expected = Counter(page_id for table in tables for page_id in table)
    for page_id in range(allocator.num_pages):
        owners, cached, indexed = allocator.owners(page_id), allocator.is_cached(page_id), page_id in allocator.index
        if owners != expected[page_id]:
            raise IntegrityError(
                f"Page {page_id} has {owners} owners but is named by {expected[page_id]} block tables."
            )
        if cached and owners:
            raise IntegrityError(f"Page {page_id} is cached though it has {owners} owners.")
        if not owners and cached != indexed:
            raise IntegrityError(
                f"Page {page_id} has no owner and is {'cached' if cached else 'indexed'}, but not both."
            )
    if allocator.num_used != len(expected):
        raise IntegrityError(f"{allocator.num_used} pages are in use but {len(expected)} are named by block tables.")
