"""Page ownership: conservation under any sequence of calls, and a check that notices what goes wrong."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from anybit.kvcache.allocator import PageAllocator
from anybit.kvcache.check import IntegrityError, check_integrity


class AllocatorMachine(RuleBasedStateMachine):
    """Owners take and return pages at random; `held` is what a correct allocator must agree with."""

    tables = Bundle("tables")

    @initialize(num_pages=st.integers(0, 12))
    def start(self, num_pages):
        self.allocator = PageAllocator(num_pages)
        self.num_pages = num_pages
        self.held = []

    @rule(target=tables, count=st.integers(0, 6))
    def allocate(self, count):
        free = self.num_pages - sum(map(len, self.held))
        pages = self.allocator.allocate(count)
        if count > free:
            assert pages is None
            return multiple()
        assert len(pages) == count
        assert len(set(pages)) == count
        assert all(0 <= page < self.num_pages for page in pages)
        taken = {page for table in self.held for page in table}
        assert not taken & set(pages), "a page was handed out twice"
        self.held.append(pages)
        return pages

    @rule(pages=consumes(tables))
    def release(self, pages):
        self.allocator.release(pages)
        self.held = [table for table in self.held if table is not pages]
        for page in pages:
            with pytest.raises(ValueError, match=f"Page {page} is already free"):
                self.allocator.release([page])

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "allocator"):
            used = sum(map(len, self.held))
            assert self.allocator.num_pages == self.num_pages
            assert self.allocator.num_used == used
            assert self.allocator.num_free == self.num_pages - used
            check_integrity(self.allocator, self.held)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


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
    allocator._owners[page] += 1  # no call shares pages yet
    check_integrity(allocator, [[page], [page]])
    allocator.release([page])
    assert (allocator.owners(page), allocator.num_free) == (1, 1)
    allocator.release([page])
    assert allocator.num_free == 2


def test_release_of_a_free_page_raises():
    with pytest.raises(ValueError, match="Page 1 is already free"):
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
