"""Who owns which page, format by format, and the exact pages in which sequences of sealed formats write."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from anybit.kvcache.allocator import PageAllocator
from anybit.kvcache.check import IntegrityError, check_integrity
from anybit.kvcache.slots import OwnSlots
from anybit.kvcache.spec import PAGE_SIZE, KVSpec


@dataclass(frozen=True, slots=True)
class FormatPages:
    """The pages of one format."""

    spec: KVSpec
    allocator: PageAllocator

    @property
    def capacity_tokens(self) -> int:
        """Of one sequence, if it had all pages."""
        return (self.allocator.num_pages - self.spec.pages_for(1) + 1) * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class PageBooks:
    """Pages by format, and own slots. `default` is the format of requests that name none."""

    formats: Mapping[str, FormatPages]
    default: str
    slots: OwnSlots = field(default_factory=OwnSlots)

    @classmethod
    def of(cls, spec: KVSpec, num_pages: int, slots: OwnSlots | None = None) -> "PageBooks":
        """Of a single format."""
        pages = FormatPages(spec, PageAllocator(num_pages))
        return cls({spec.format: pages}, spec.format, slots or OwnSlots())

    def bytes_total(self) -> dict[str, int]:
        """Of all pages, by format, as those that follow."""
        return self._bytes(lambda allocator: allocator.num_pages)

    def bytes_used(self) -> dict[str, int]:
        return self._bytes(lambda allocator: allocator.num_used)

    def bytes_cached(self) -> dict[str, int]:
        return self._bytes(lambda allocator: allocator.num_cached)

    @property
    def pages_total(self) -> int:
        return sum(pages.allocator.num_pages for pages in self.formats.values())

    @property
    def pages_used(self) -> int:
        return sum(pages.allocator.num_used for pages in self.formats.values())

    def _bytes(self, count: Callable[[PageAllocator], int]) -> dict[str, int]:
        return {name: count(pages.allocator) * pages.spec.page_bytes for name, pages in self.formats.items()}

    def check(self, tables: Mapping[str, Sequence[list[int]]], slots: Iterable[list[int]]) -> None:
        """Raise IntegrityError unless the block tables, by format, and the slots of live sequences are what is owned."""
        for name, pages in self.formats.items():
            check_integrity(pages.allocator, tables.get(name, ()))
        named = [slot for own in slots for slot in own]
        if len(named) != len(set(named)) or len(named) != self.slots.num_used:
            raise IntegrityError(f"{self.slots.num_used} own slots are in use but sequences name {len(named)}.")
