"""Which tokens a step computes: decoding first, prompts in order of arrival, never more than the budgets."""

from dataclasses import replace

import pytest

from anybit.engine.errors import CapacityError
from anybit.engine.scheduler import Scheduler, SchedulerConfig
from anybit.engine.sequence import Sequence
from anybit.kvcache.books import PageBooks
from anybit.kvcache.check import IntegrityError
from tests.fixtures.engine import make_request
from tests.fixtures.fake_runner import SPEC
from tests.fixtures.sentences import assert_one_sentence


def make_scheduler(num_pages=8, max_num_seqs=4, max_step_tokens=32, checkpoint_hash="model"):
    scheduler = Scheduler(
        PageBooks.of(SPEC, num_pages), SchedulerConfig(max_num_seqs, max_step_tokens, checkpoint_hash)
    )
    return scheduler, scheduler.books.formats[SPEC.format].allocator


def add(scheduler, name, num_tokens, max_tokens=1, bit_width=4, token=None, salt="", **sampling):
    """A sequence of one token repeated: by default another one for each name."""
    token_ids = [ord(name[0]) if token is None else token] * num_tokens
    request = replace(make_request(name, token_ids, max_tokens, bit_width, **sampling), cache_salt=salt)
    sequence = Sequence(request, arrived_at=0.0)
    scheduler.add(sequence)
    return sequence


def step(scheduler):
    """One step of a perfect model: every chunk is computed, every finished prompt gets a token."""
    chunks = scheduler.schedule(1.0)
    layout = [(chunk.sequence.request.request_id, chunk.num_tokens) for chunk in chunks]
    completed = [chunk.sequence for chunk in chunks if chunk.completes]
    scheduler.record(chunks)
    for sequence in completed:
        sequence.token_ids.append(1)
    scheduler.check_integrity()
    return layout


def finish(scheduler, sequence):
    """Compute what is left of a prompt and end the sequence."""
    while sequence.num_generated == 0:
        step(scheduler)
    scheduler.remove(sequence)
    scheduler.check_integrity()


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


def test_admission_takes_pages_for_the_tokens_there_are_and_one_more_at_every_border():
    scheduler, allocator = make_scheduler(num_pages=5, max_step_tokens=200)
    first = add(scheduler, "a", 63, max_tokens=70)
    step(scheduler)
    assert len(first.pages) == 1
    step(scheduler)  # computes the 64th token
    assert len(first.pages) == 1
    step(scheduler)
    assert len(first.pages) == allocator.num_used == 2


def test_small_request_never_overtakes_a_large_one():
    scheduler, _ = make_scheduler(num_pages=4)
    first = add(scheduler, "a", 150, max_tokens=9)
    add(scheduler, "b", 100, max_tokens=100)
    add(scheduler, "c", 1)
    assert [name for name, _ in step(scheduler)] == ["a"]
    assert sum(scheduler.running_by_width().values()) == 1
    scheduler.remove(first)
    assert sorted(name for name, _ in step(scheduler)) == ["b", "c"]


def test_admission_leaves_a_page_to_grow_into_for_everyone_who_runs():
    scheduler, _ = make_scheduler(num_pages=5, max_step_tokens=500)
    add(scheduler, "a", 60, max_tokens=100)
    add(scheduler, "b", 60, max_tokens=100)
    add(scheduler, "c", 60, max_tokens=100)
    assert [name for name, _ in step(scheduler)] == ["a", "b", "c"]
    scheduler, _ = make_scheduler(num_pages=4, max_step_tokens=500)
    for name in "abc":
        add(scheduler, name, 60, max_tokens=100)
    assert [name for name, _ in step(scheduler)] == ["a", "b"]


def test_the_youngest_is_preempted_when_an_older_one_needs_its_pages():
    scheduler, allocator = make_scheduler(num_pages=5, max_step_tokens=500, checkpoint_hash=None)
    old, young = add(scheduler, "a", 184, max_tokens=50), add(scheduler, "b", 60, max_tokens=50)
    while len(young.pages) < 2:
        step(scheduler)
    assert (len(old.pages), allocator.num_available) == (3, 0)
    while len(old.token_ids) <= 192:
        step(scheduler)
    generated = young.num_generated
    assert step(scheduler) == [("a", 1)]
    assert (young.pages, young.num_computed, young.num_generated) == ([], 0, generated)
    assert scheduler.counters.preemptions == 1
    assert scheduler.sequences() == [old, young]
    scheduler.remove(old)
    assert step(scheduler) == [("b", 60 + generated)]  # prompt and answer are computed again
    assert young.scheduled_at == 1.0
    assert allocator.num_used == 2


def test_a_preempted_sequence_is_before_those_that_came_after_it():
    scheduler, _ = make_scheduler(num_pages=2, max_num_seqs=2, max_step_tokens=500, checkpoint_hash=None)
    old = add(scheduler, "a", 62, max_tokens=60)
    add(scheduler, "b", 10)
    add(scheduler, "c", 10)
    while len(old.pages) < 2:
        step(scheduler)
    assert [sequence.request.request_id for sequence in scheduler.sequences()] == list("abc")
    assert sum(scheduler.running_by_width().values()) == 1


def test_equal_prompts_share_their_full_pages():
    scheduler, allocator = make_scheduler(max_step_tokens=500)
    first = add(scheduler, "a", 150, token=7, max_tokens=50)
    step(scheduler)
    second = add(scheduler, "b", 150, token=7, max_tokens=50)
    assert step(scheduler) == [("a", 1), ("b", 150 - 128)]
    assert first.pages[:2] == second.pages[:2]
    assert first.pages[2] != second.pages[2]
    assert (second.num_cached_tokens, allocator.num_used) == (128, 4)
    assert (scheduler.counters.prefix_queried_tokens, scheduler.counters.prefix_hit_tokens) == (300, 128)


def test_pages_of_an_ended_sequence_serve_the_next_one_until_they_are_needed():
    scheduler, allocator = make_scheduler(num_pages=4, max_step_tokens=500)
    finish(scheduler, add(scheduler, "a", 150, token=7))
    assert (allocator.num_used, allocator.num_cached) == (0, 2)
    add(scheduler, "b", 150, token=7)
    assert step(scheduler) == [("b", 22)]
    scheduler.remove(scheduler.find("b"))
    finish(scheduler, add(scheduler, "c", 200))  # takes all four
    add(scheduler, "d", 150, token=7)
    assert step(scheduler) == [("d", 150)]


def test_the_newest_token_always_runs_through_the_model():
    scheduler, _ = make_scheduler(max_step_tokens=500)
    finish(scheduler, add(scheduler, "a", 128, token=7))
    again = add(scheduler, "b", 128, token=7)
    assert step(scheduler) == [("b", 64)]
    assert again.num_cached_tokens == 64


@pytest.mark.parametrize("other", [{"bit_width": 8}, {"salt": "mine"}, {"token": 8}], ids=["width", "salt", "tokens"])
def test_pages_are_not_shared_between_widths_salts_or_texts(other):
    scheduler, _ = make_scheduler(num_pages=16, max_step_tokens=500)
    finish(scheduler, add(scheduler, "a", 150, **{"token": 7, "bit_width": 2}))
    add(scheduler, "b", 150, **{"token": 7, "bit_width": 2, **other})
    assert step(scheduler) == [("b", 150)]


def test_a_prompt_that_is_scored_is_computed_whole_but_feeds_the_cache():
    scheduler, _ = make_scheduler(max_step_tokens=500)
    finish(scheduler, add(scheduler, "a", 150, token=7, num_prompt_logprobs=0))
    finish(scheduler, add(scheduler, "b", 150, token=7, num_prompt_logprobs=0))
    assert scheduler.counters.prefix_hit_tokens == 0
    add(scheduler, "c", 150, token=7)
    assert step(scheduler) == [("c", 22)]


def test_one_computes_a_prompt_while_its_copies_wait_and_others_pass():
    scheduler, allocator = make_scheduler(num_pages=12, max_num_seqs=8, max_step_tokens=100)
    for name in ("a0", "a1", "a2", "b"):
        add(scheduler, name, 150, token=ord(name[0]), max_tokens=40)
    assert step(scheduler) == [("a0", 100)]  # a whole page is done, the next is on its way
    assert step(scheduler) == [("a0", 50), ("b", 50)]
    assert step(scheduler) == [("a0", 1), ("a1", 22), ("a2", 22), ("b", 55)]
    assert allocator.num_used == 3 + 1 + 1 + 3
    assert [sequence.request.request_id for sequence in scheduler.sequences()] == ["a0", "a1", "a2", "b"]


def test_copies_do_not_wait_for_one_that_is_gone():
    scheduler, _ = make_scheduler(num_pages=12, max_step_tokens=50)
    first = add(scheduler, "a", 150, token=7)
    add(scheduler, "b", 150, token=7)
    assert step(scheduler) == [("a", 50)]
    scheduler.remove(first)
    assert step(scheduler) == [("b", 50)]


def test_pages_of_a_failed_sequence_are_not_found_again():
    scheduler, allocator = make_scheduler(max_step_tokens=500)
    failed = add(scheduler, "a", 150, token=7)
    step(scheduler)
    scheduler.remove(failed, keep_pages=False)
    scheduler.check_integrity()
    assert (allocator.num_used, allocator.num_cached) == (0, 0)
    add(scheduler, "b", 150, token=7)
    assert step(scheduler) == [("b", 150)]


def test_answers_are_cached_too():
    scheduler, _ = make_scheduler(max_step_tokens=500)
    chat = add(scheduler, "a", 60, max_tokens=100, token=1)  # the perfect model answers 1 as well
    while chat.num_generated < 80:
        step(scheduler)
    scheduler.remove(chat)
    add(scheduler, "b", 150, token=1)
    assert step(scheduler) == [("b", 22)]


def test_without_a_prefix_cache_nothing_is_kept():
    scheduler, allocator = make_scheduler(max_step_tokens=500, checkpoint_hash=None)
    finish(scheduler, add(scheduler, "a", 150, token=7))
    assert (allocator.num_used, allocator.num_cached) == (0, 0)


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
