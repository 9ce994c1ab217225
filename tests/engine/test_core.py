"""The core around a fake runner: what is answered when, what failures spare, what is counted."""

import logging

import pytest

from anybit.engine.types import FinishReason, TokenEvent
from tests.fixtures.engine import make_request, run, tokens_by_request
from tests.fixtures.fake_runner import BYTES_READ, HEAD_BYTES, SPEC, FakeRunner, answer_of, fake_core
from tests.fixtures.sentences import assert_one_sentence


def test_request_gets_its_tokens_one_event_a_step():
    core, request = fake_core(FakeRunner()), make_request("a", [3, 4], max_tokens=3)
    assert core.add(request) == []
    events = [event for _ in range(3) for event in core.step()]
    assert [event.token_ids for event in events] == [[token] for token in answer_of(request)[0]]
    assert [event.finish_reason for event in events] == [None, None, FinishReason.LENGTH]
    assert not core.has_work
    assert core.step() == []


def test_stop_token_ends_the_sequence_and_is_not_among_its_tokens():
    core = fake_core(FakeRunner())
    plain = make_request("a", [3, 4], max_tokens=9)
    tokens = answer_of(plain)[0]
    request = make_request("a", [3, 4], max_tokens=9, stop_token_ids=(tokens[2],))
    core.add(request)
    events = [event for _ in range(3) for event in core.step()]
    assert tokens_by_request(events) == {"a": tokens[:2]}
    assert events[-1].finish_reason is FinishReason.STOP
    assert core.take_stats().kv_pages_used == 0


def test_only_the_first_event_tells_the_times():
    core = fake_core(FakeRunner(), max_step_tokens=2)
    core.add(make_request("a", [3, 4, 5], max_tokens=3))
    assert core.step() == []  # half of the prompt
    first, second, third = (event for _ in range(3) for event in core.step())
    assert first.queue_seconds >= 0
    assert first.prefill_seconds > 0
    assert {second.queue_seconds, second.prefill_seconds, third.queue_seconds, third.prefill_seconds} == {None}


@pytest.mark.parametrize(
    ("request_", "parts"),
    [
        (make_request("a", [1] * 500, max_tokens=13), ("500", "13", "512")),
        (make_request("a", [], max_tokens=1), ("0 tokens",)),
        (make_request("a", [1], bit_width=3), ("Bit-width 3", "not loaded")),
        (make_request("a", [1] * 500, max_tokens=12), ("8 pages", "the server has 7")),
    ],
    ids=["context", "empty", "width", "cache"],
)
def test_request_that_can_never_run_is_answered_at_once(request_, parts):
    core = fake_core(FakeRunner(), num_pages=7)
    (event,) = core.add(request_)
    assert event.finish_reason is FinishReason.ERROR
    assert_one_sentence(event.error, *parts)
    assert not core.has_work


def test_request_that_just_fits_runs():
    core = fake_core(FakeRunner())
    assert len(run(core, [make_request("a", [1] * 500, max_tokens=12)])["a"]) == 12


def test_step_that_fails_ends_its_own_sequences_and_no_others(caplog):
    runner = FakeRunner()
    core = fake_core(runner, max_num_seqs=2)
    requests = [make_request(name, [ord(name)], max_tokens=3) for name in "abc"]
    for request in requests:
        core.add(request)
    runner.fail_next = True
    with caplog.at_level(logging.ERROR, "anybit.engine"):
        events = core.step()
    assert [(event.request_id, event.finish_reason) for event in events] == [
        ("a", FinishReason.ERROR),
        ("b", FinishReason.ERROR),
    ]
    assert_one_sentence(events[0].error)
    assert "secret" not in events[0].error
    assert "a secret detail" in caplog.text
    core.check_integrity()
    assert run(core, []) == {"c": answer_of(requests[2])[0]}


def test_row_without_a_token_fails_alone():
    runner = FakeRunner()
    core = fake_core(runner)
    requests = [make_request(name, [ord(name)], max_tokens=3) for name in "abc"]
    for request in requests:
        core.add(request)
    core.step()
    runner.poisoned.add("b")
    events = core.step()
    assert [event.finish_reason for event in events] == [None, FinishReason.ERROR, None]
    assert_one_sentence(events[1].error, "not finite")
    rest = run(core, [])
    assert {name: rest[name][-1] for name in rest} == {
        name: answer_of(requests[i])[0][-1] for i, name in ((0, "a"), (2, "c"))
    }


def test_abort_ends_running_and_waiting_sequences_and_ignores_others():
    core = fake_core(FakeRunner(), max_num_seqs=1)
    for name in "ab":
        core.add(make_request(name, [1], max_tokens=9))
    core.step()
    assert core.abort("b") == [TokenEvent("b", [], FinishReason.ABORT)]
    assert core.abort("a") == [TokenEvent("a", [], FinishReason.ABORT)]
    assert core.abort("a") == core.abort("never seen") == []
    assert not core.has_work
    core.check_integrity()
    assert core.take_stats().kv_pages_used == 0


def test_abort_all_ends_everything():
    core = fake_core(FakeRunner(), max_num_seqs=2)
    for name in "abcd":
        core.add(make_request(name, [1], max_tokens=9))
    core.step()
    assert sorted(event.request_id for event in core.abort_all()) == list("abcd")
    assert not core.has_work
    core.check_integrity()


def test_stats_count_sequences_pages_steps_and_bytes():
    core = fake_core(FakeRunner(), max_num_seqs=2, max_step_tokens=5)
    for name, width in (("a", 2), ("b", 8), ("c", 8)):
        core.add(make_request(name, [1, 2, 3, 4], max_tokens=70, bit_width=width))
    core.step()  # all of a, one token of b
    core.step()  # one of a, three of b
    stats = core.take_stats(resident_bytes=123)
    assert (stats.running, stats.waiting) == ({2: 1, 8: 1}, {8: 1})
    assert (stats.kv_pages_total, stats.kv_pages_used) == (3 * 8, 2)  # of three formats
    assert (stats.kv_bytes_total["bf16"], stats.kv_bytes_used["bf16"]) == (8 * SPEC.page_bytes, 2 * SPEC.page_bytes)
    assert (stats.steps, stats.step_tokens, stats.resident_bytes) == (2, [5, 4], 123)
    # Both steps read both widths; the head was read in both and is charged to the larger.
    assert stats.weight_bytes_read == {2: 2 * BYTES_READ[2], 8: 2 * (BYTES_READ[8] + HEAD_BYTES)}
    assert core.take_stats().step_tokens == []
    assert core.take_stats().steps == 2


def test_stats_count_the_prefix_cache_and_preemptions():
    core = fake_core(FakeRunner(), num_pages=5, max_step_tokens=500)
    requests = [make_request("a", [7] * 150, max_tokens=1), make_request("b", [7] * 184, max_tokens=40)]
    requests.append(make_request("c", [8] * 60, max_tokens=50))
    tokens = run(core, requests[:1]) | run(core, requests[1:])
    assert tokens == {request.request_id: answer_of(request)[0] for request in requests}
    stats = core.take_stats()
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (394, 128)
    assert stats.preemptions == 1
    assert stats.kv_bytes_cached["bf16"] > 0


def test_first_token_tells_how_much_of_the_prompt_was_cached():
    core = fake_core(FakeRunner(), max_step_tokens=500)
    run(core, [make_request("a", [7] * 150, max_tokens=1)])
    core.add(make_request("b", [7] * 150, max_tokens=2))
    assert [event.num_cached_tokens for event in core.step() + core.step()] == [128, None]


def test_zero_tokens_compute_the_prompt_only():
    core = fake_core(FakeRunner())
    core.add(make_request("a", [1] * 40, max_tokens=0))
    assert core.step() == []
    (event,) = core.step()
    assert (event.token_ids, event.finish_reason) == ([], FinishReason.LENGTH)
    assert not core.has_work


def test_step_of_an_unfinished_prompt_reads_no_head():
    core = fake_core(FakeRunner(), max_step_tokens=2)
    core.add(make_request("a", [1, 2, 3], bit_width=4))
    core.step()
    assert core.take_stats().weight_bytes_read == {4: BYTES_READ[4]}


def test_a_step_begins_before_the_one_before_it_has_been_taken_in():
    runner = FakeRunner(runs_ahead=True)
    core, request = fake_core(runner), make_request("a", [3, 4], max_tokens=4)
    core.add(request)
    assert len(core.step()) == 1  # the prompt, whose last row is no step of one token
    assert len(runner.steps) == 1
    events = core.step()
    assert len(runner.steps) == 3
    while core.has_work:
        events += core.step()
    assert len(runner.steps) == 4, "a step was begun for a token that nobody asked for"
    assert [token for event in events for token in event.token_ids] == answer_of(request)[0][1:]


def test_what_was_begun_for_a_request_that_stopped_is_forgotten():
    runner = FakeRunner(runs_ahead=True)
    core, stopping = fake_core(runner), make_request("a", [3, 4], max_tokens=9)
    tokens = answer_of(stopping)[0]
    stop = next(index for index in range(2, 9) if tokens[index] not in tokens[:index])
    stopping = make_request("a", [3, 4], max_tokens=9, stop_token_ids=(tokens[stop],))
    going_on = make_request("b", [5], max_tokens=9)
    events = [*core.add(stopping), *core.add(going_on)]
    while core.has_work:
        events += core.step()
        core.check_integrity()
    texts = {
        name: [token for event in events if event.request_id == name for token in event.token_ids] for name in "ab"
    }
    assert texts == {"a": tokens[:stop], "b": answer_of(going_on)[0]}
    assert core.take_stats().kv_pages_used == 0


def test_a_step_that_cannot_decide_once_another_has_followed_is_run_again():
    runner = FakeRunner(runs_ahead=True)
    core = fake_core(runner)
    requests = [make_request("a", [3, 4], max_tokens=6), make_request("b", [5], max_tokens=20)]
    events = [event for request in requests for event in core.add(request)]
    for number in range(4):
        events += core.step()
        core.check_integrity()
        if number == 2:
            runner.undecided_next = True
            events += core.abort("a")
    while core.has_work:
        events += core.step()
    assert not runner.undecided_next
    texts = {
        name: [token for event in events if event.request_id == name for token in event.token_ids] for name in "ab"
    }
    assert texts["b"] == answer_of(requests[1])[0]
    assert texts["a"] == answer_of(requests[0])[0][: len(texts["a"])]


def test_an_abort_while_a_step_is_under_way_frees_its_pages():
    core = fake_core(FakeRunner(runs_ahead=True))
    core.add(make_request("a", [3, 4], max_tokens=100))
    core.step()
    core.step()
    assert core.abort("a")[0].finish_reason is FinishReason.ABORT
    assert core.has_work  # the step that has begun
    assert core.step() == []
    assert not core.has_work
    assert core.take_stats().kv_pages_used == 0
