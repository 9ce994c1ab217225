"""The kinds of memory add up to what is held."""

import torch

from anybit.engine.device_memory import DeviceMemory
from anybit.engine.machine import resident_bytes
from anybit.kvcache.books import PageBooks
from anybit.kvcache.spec import KVSpec


def test_kinds_of_a_cpu_add_up_to_the_resident_memory_of_the_process() -> None:
    books = PageBooks.of(KVSpec(2, 2, 16, "bf16"), num_pages=8)
    memory = DeviceMemory(torch.device("cpu"), weights_bytes=5_000_000)
    empty = memory.held_bytes(books)
    assert (empty["weights"], empty["kv_cache"]) == (5_000_000, 0)
    books.formats["bf16"].allocator.allocate(3)
    held = memory.held_bytes(books)
    assert held["kv_cache"] == 3 * books.formats["bf16"].spec.page_bytes
    assert abs(sum(held.values()) - resident_bytes()) < 2**20
    assert memory.free_bytes() > 0


def test_weights_that_are_not_resident_yet_leave_no_negative_workspace() -> None:
    books = PageBooks.of(KVSpec(2, 2, 16, "bf16"), num_pages=8)
    assert DeviceMemory(torch.device("cpu"), weights_bytes=2**60).held_bytes(books)["workspace"] == 0
