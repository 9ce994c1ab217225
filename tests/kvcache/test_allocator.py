"""Page ownership: conservation under any sequence of calls, and a check that notices what goes wrong."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from anybit.kvcache.allocator import PageAllocator
from anybit.kvcache.check import IntegrityError, check_integrity


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences take, share and return pages at random; `held` and `content` are what a correct allocator must agree with.

    `content` maps a page to the key it was indexed under; `kept` lists cached pages, the next to be taken first.
    """

    tables = Bundle("tables")

    @initialize(num_pages=st.integers(0, 12))
    def start(self, num_pages):
        self.allocator = PageAllocator(num_pages)
        self.num_pages = num_pages
        self.held = []
        self.content = {}
        self.kept = []
        self.num_keys = 0

    @property
    def owned(self):
        return Counter(page for table in self.held for page in table)

    @rule(target=tables, count=st.integers(0, 6))
    def allocate(self, count):
        available = self.num_pages - len(self.owned)
        owned = self.owned
        pages = self.allocator.allocate(count)
        if count > available:
            assert pages is None
            return multiple()
        assert len(set(pages)) == len(pages) == count
        assert all(0 <= page < self.num_pages for page in pages)
        assert not owned.keys() & set(pages), "a page was handed out twice"
        evicted = self.kept[: max(0, count - (available - len(self.kept)))]
        self.kept = self.kept[len(evicted) :]
        assert set(evicted) <= set(pages), "the page given up longest ago goes first, and free pages before it"
        for page in evicted:
            del self.content[page]
        self.held.append(pages)
        return pages

    @rule(target=tables, pages=tables)
    def share(self, pages):
        self.allocator.share(pages)
        copy = list(pages)
        self.held.append(copy)
        return copy

    @precondition(lambda self: self.content)
    @rule(target=tables, data=st.data())
    def find_and_share(self, data):
        page, key = data.draw(st.sampled_from(sorted(self.content.items())))
        assert self.allocator.index.find([key, b"unknown", key]) == [page]
        self.allocator.share([page])
        self.kept = [kept for kept in self.kept if kept != page]
        self.held.append([page])
        return self.held[-1]

    @rule(pages=tables)
    def index(self, pages):
        for page in pages:
            key = str(self.num_keys).encode()
            self.num_keys += 1
            self.allocator.index.insert(key, page)
            self.content.setdefault(page, key)

    @rule(pages=tables)
    def discard(self, pages):
        for page in pages:
            self.allocator.index.discard(page)
            self.content.pop(page, None)

    @rule(pages=consumes(tables))
    def release(self, pages):
        self.allocator.release(pages)
        self.held = [table for table in self.held if table is not pages]
        owned = self.owned
        self.kept += [page for page in reversed(pages) if not owned[page] and page in self.content]
        for page in pages:
            if not owned[page]:
                with pytest.raises(ValueError, match=f"Page {page} has no owner"):
                    self.allocator.release([page])

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "allocator"):
            used = len(self.owned)
            allocator = self.allocator
            assert (allocator.num_pages, allocator.num_used) == (self.num_pages, used)
            assert (allocator.num_cached, allocator.num_available) == (len(self.kept), self.num_pages - used)
            assert len(allocator.index) == len(self.content)
            check_integrity(allocator, self.held)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_allocate_hands_out_every_page_once():
    allocator = PageAllocator(5)
    assert sorted(allocator.allocate(2) + allocator.allocate(3)) == [0, 1, 2, 3, 4]
    assert allocator.allocate(1) is None


def test_allocate_takes_nothing_when_there_is_not_enough():
    allocator = PageAllocator(3)
    assert allocator.allocate(4) is None
    assert allocator.num_free == 3


def test_released_pages_can_be_taken_again():
    allocator = PageAllocator(3)
    pages = allocator.allocate(3)
    allocator.release(pages[1:])
    assert sorted(allocator.allocate(2)) == sorted(pages[1:])


def test_page_with_two_owners_is_free_when_both_have_released_it():
    allocator = PageAllocator(2)
    (page,) = allocator.allocate(1)
    allocator.share([page])
    check_integrity(allocator, [[page], [page]])
    allocator.release([page])
    assert (allocator.owners(page), allocator.num_free) == (1, 1)
    allocator.release([page])
    assert allocator.num_free == 2


def test_release_of_a_free_page_raises():
    with pytest.raises(ValueError, match="Page 1 has no owner"):
        PageAllocator(2).release([1])


def taken(num_pages, count):
    allocator = PageAllocator(num_pages)
    return allocator, allocator.allocate(count)


def test_check_integrity_accepts_pages_that_are_named_as_often_as_owned():
    allocator, pages = taken(4, 3)
    check_integrity(allocator, [pages[:1], [], pages[1:]])
    allocator.release(pages)
    check_integrity(allocator, [])


def test_check_integrity_notices_a_leaked_page():
    allocator, pages = taken(4, 3)
    with pytest.raises(IntegrityError, match=f"Page {pages[2]} has 1 owners but is named by 0 block tables"):
        check_integrity(allocator, [pages[:2]])


def test_check_integrity_notices_a_page_in_two_tables():
    allocator, pages = taken(4, 2)
    with pytest.raises(IntegrityError, match=f"Page {pages[0]} has 1 owners but is named by 2 block tables"):
        check_integrity(allocator, [pages, pages[:1]])


def test_check_integrity_notices_a_table_that_names_a_free_page():
    allocator, pages = taken(4, 2)
    allocator.release(pages[:1])
    with pytest.raises(IntegrityError, match=f"Page {pages[0]} has 0 owners"):
        check_integrity(allocator, [pages])


def test_check_integrity_notices_a_page_lost_from_the_free_list():
    allocator, pages = taken(4, 2)
    allocator._free.pop()
    with pytest.raises(IntegrityError, match="3 pages are in use but 2 are named"):
        check_integrity(allocator, [pages])


def test_check_integrity_notices_a_page_that_does_not_exist():
    allocator, pages = taken(4, 2)
    with pytest.raises(IntegrityError):
        check_integrity(allocator, [[*pages, 4]])


def test_share_of_a_free_page_raises():
    with pytest.raises(ValueError, match="Page 1 is free"):
        PageAllocator(2).share([1])


def test_check_integrity_notices_a_cached_page_that_nobody_can_find():
    allocator, pages = taken(4, 1)
    allocator.index.insert(b"key", pages[0])
    allocator.release(pages)
    check_integrity(allocator, [])
    allocator.index.discard(pages[0])
    with pytest.raises(IntegrityError, match=f"Page {pages[0]} has no owner and is cached"):
        check_integrity(allocator, [])


def test_a_sequence_loses_its_last_cached_page_first():
    allocator, pages = taken(3, 3)
    for number, page in enumerate(pages):
        allocator.index.insert(bytes([number]), page)
    allocator.release(pages)
    assert [allocator.allocate(1) for _ in range(3)] == [[page] for page in reversed(pages)]
