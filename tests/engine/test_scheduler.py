"""Which tokens a step computes: decoding first, prompts in order of arrival, never more than the budgets."""

import pytest

from anybit.engine.errors import CapacityError
from anybit.engine.scheduler import Scheduler
from anybit.engine.sequence import Sequence
from anybit.kvcache.allocator import PageAllocator
from anybit.kvcache.check import IntegrityError
from tests.fixtures.engine import make_request
from tests.fixtures.fake_runner import SPEC
from tests.fixtures.sentences import assert_one_sentence


def make_scheduler(num_pages=8, max_num_seqs=4, max_step_tokens=32):
    allocator = PageAllocator(num_pages)
    return Scheduler(SPEC, allocator, max_num_seqs, max_step_tokens), allocator


def add(scheduler, name, num_tokens, max_tokens=1, bit_width=4):
    sequence = Sequence(make_request(name, [1] * num_tokens, max_tokens, bit_width), arrived_at=0.0)
    scheduler.add(sequence)
    return sequence


def step(scheduler):
    """One step of a perfect model: every chunk is computed, every finished prompt gets a token."""
    chunks = scheduler.schedule(1.0)
    layout = [(chunk.sequence.request.request_id, chunk.num_tokens) for chunk in chunks]
    for chunk in chunks:
        completes = chunk.completes
        chunk.sequence.num_computed += chunk.num_tokens
        if completes:
            chunk.sequence.token_ids.append(1)
    return layout


def test_long_prompt_is_computed_in_chunks_of_the_budget():
    scheduler, _ = make_scheduler(max_step_tokens=32)
    add(scheduler, "a", 70, max_tokens=3)
    assert [step(scheduler) for _ in range(5)] == [[("a", 32)], [("a", 32)], [("a", 6)], [("a", 1)], [("a", 1)]]


def test_decoding_goes_before_prompts_and_prompts_share_what_is_left_in_order():
    scheduler, _ = make_scheduler(max_step_tokens=32)
    add(scheduler, "a", 5, max_tokens=9)
    add(scheduler, "b", 5, max_tokens=9)
    assert step(scheduler) == [("a", 5), ("b", 5)]
    add(scheduler, "c", 20)
    add(scheduler, "d", 20)
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 20), ("d", 10)]
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 1), ("d", 10)]


def test_more_decoding_sequences_than_the_budget_are_cut_to_it():
    scheduler, _ = make_scheduler(max_step_tokens=2)
    for name in "abc":
        add(scheduler, name, 1, max_tokens=5)
    assert step(scheduler) == [("a", 1), ("b", 1)]


def test_no_more_than_max_num_seqs_run_and_the_rest_wait_in_order():
    scheduler, _ = make_scheduler(max_num_seqs=2)
    sequences = {name: add(scheduler, name, 3, max_tokens=9) for name in "abcd"}
    step(scheduler)
    assert [sequence.request.request_id for sequence in scheduler.sequences()] == list("abcd")
    assert (scheduler.running_by_width(), scheduler.waiting_by_width()) == ({4: 2}, {4: 2})
    scheduler.remove(sequences["a"])
    assert step(scheduler) == [("b", 1), ("c", 3)]
    assert sequences["c"].scheduled_at == 1.0
    assert sequences["d"].scheduled_at is None


def test_admission_takes_all_pages_a_sequence_can_ever_need():
    scheduler, allocator = make_scheduler(num_pages=5)
    first = add(scheduler, "a", 60, max_tokens=70)  # 129 tokens in the cache at most
    add(scheduler, "b", 64, max_tokens=1)  # the sampled token never enters it
    step(scheduler)
    assert len(first.pages) == 3
    assert allocator.num_used == 4


def test_small_request_never_overtakes_a_large_one():
    scheduler, _ = make_scheduler(num_pages=4)
    first = add(scheduler, "a", 150, max_tokens=9)
    add(scheduler, "b", 100, max_tokens=100)
    add(scheduler, "c", 1)
    assert [name for name, _ in step(scheduler)] == ["a"]
    scheduler.remove(first)
    assert [name for name, _ in step(scheduler)] == ["b"]


def test_request_that_could_not_run_alone_is_refused():
    scheduler, _ = make_scheduler(num_pages=2)
    add(scheduler, "fits", 100, max_tokens=29)
    with pytest.raises(CapacityError) as caught:
        add(scheduler, "does not", 100, max_tokens=30)
    assert_one_sentence(caught.value, "3 pages", "the server has 2")
    assert [sequence.request.request_id for sequence in scheduler.sequences()] == ["fits"]


def test_remove_gives_the_pages_back_and_forgets_the_waiting():
    scheduler, allocator = make_scheduler(max_num_seqs=1)
    running, waiting = add(scheduler, "a", 100), add(scheduler, "b", 100)
    step(scheduler)
    scheduler.remove(waiting)
    assert allocator.num_used == 2
    scheduler.remove(running)
    assert allocator.num_used == 0
    assert running.pages == []
    assert not scheduler.has_work
    scheduler.check_integrity()


def test_find_knows_running_and_waiting_sequences_only():
    scheduler, _ = make_scheduler(max_num_seqs=1)
    running, waiting = add(scheduler, "a", 3), add(scheduler, "b", 3)
    step(scheduler)
    assert scheduler.find("a") is running
    assert scheduler.find("b") is waiting
    assert scheduler.find("c") is None
    scheduler.remove(running)
    assert scheduler.find("a") is None


def test_check_integrity_notices_pages_that_a_sequence_lost():
    scheduler, _ = make_scheduler()
    sequence = add(scheduler, "a", 100)
    step(scheduler)
    sequence.pages = sequence.pages[:1]
    with pytest.raises(IntegrityError):
        scheduler.check_integrity()


def test_nothing_to_do_schedules_nothing():
    scheduler, _ = make_scheduler()
    assert scheduler.schedule(0.0) == []
    assert not scheduler.has_work
