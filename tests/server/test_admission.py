"""The queue: counted when checked, refused with 429 and a time to come back, given back whatever happens."""

import threading

import openai
import pytest

from anybit.server.admission import Admission
from anybit.server.errors import QueueFullError
from tests.server.fake_engine import FakeEngine
from tests.waiting import wait_until


def test_sequences_and_tokens_are_counted_and_given_back():
    admission = Admission(10, 100)
    ticket = admission.enter(3)
    ticket.add_tokens([10, 20, 30])
    assert (admission.num_waiting, admission.waiting_tokens) == (3, 60)
    ticket.started(1)
    ticket.started(1)
    assert (admission.num_waiting, admission.waiting_tokens) == (2, 40)
    ticket.release()
    ticket.release()
    assert (admission.num_waiting, admission.waiting_tokens) == (0, 0)


def test_ticket_without_tokens_is_given_back():
    admission = Admission(10, 100)
    admission.enter(3).release()
    assert admission.num_waiting == 0


def test_sequences_over_the_limit_are_refused_and_not_counted():
    admission = Admission(4, 100)
    admission.enter(3)
    with pytest.raises(QueueFullError) as caught:
        admission.enter(2)
    assert caught.value.code == "queue_full"
    assert admission.num_waiting == 3
    admission.enter(1)
    assert admission.full


def test_tokens_over_the_limit_are_refused_and_not_counted():
    admission = Admission(10, 100)
    admission.enter(1).add_tokens([60])
    second = admission.enter(1)
    with pytest.raises(QueueFullError) as caught:
        second.add_tokens([50])
    assert caught.value.code == "token_budget"
    second.release()
    assert (admission.num_waiting, admission.waiting_tokens) == (1, 60)


def test_empty_queue_takes_a_request_larger_than_the_limits():
    admission = Admission(2, 100)
    ticket = admission.enter(8)
    ticket.add_tokens([50] * 8)
    assert admission.full
    ticket.release()
    assert not admission.full


def test_retry_after_follows_the_waiting_time():
    now = [0.0]
    admission = Admission(10, 100, clock=lambda: now[0])
    assert admission.retry_after_seconds == 1
    for _ in range(30):
        ticket = admission.enter(1)
        ticket.add_tokens([1])
        now[0] += 20
        ticket.started(0)
    assert admission.retry_after_seconds == 20
    for _ in range(30):
        ticket = admission.enter(1)
        ticket.add_tokens([1])
        now[0] += 5000
        ticket.started(0)
    assert admission.retry_after_seconds == 60


@pytest.fixture
def waiting(start):
    """A server whose engine holds one request in its queue."""
    engine = FakeEngine(hold=True)
    server = start(engine, max_queued_requests=1, max_queued_tokens=20)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.complete(prompt=[5] * 15)))
    thread.start()
    wait_until(lambda: bool(engine.running), "the request did not reach the engine")
    yield server
    engine.hold = False
    thread.join()
    assert answers[0].status_code == 200


def test_full_queue_is_429_with_retry_after(waiting):
    response = waiting.complete()
    assert response.status_code == 429
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert response.headers["x-bit-width"] == "4"
    error = response.json()["error"]
    assert error["type"] == "rate_limit_error"
    assert error["message"] == "1 requests are waiting already; try again later."
    with pytest.raises(openai.RateLimitError):
        waiting.openai.completions.create(model="tiny", prompt="a")
    assert waiting.metric("anybit_rejections_total", reason="queue_full") == 2


def test_full_queue_is_not_ready_but_healthy(waiting):
    response = waiting.http.get("/ready")
    assert response.status_code == 503
    assert response.json() == {"status": "busy"}
    assert waiting.http.get("/health").status_code == 200


def test_running_requests_do_not_count_as_queued(start):
    engine = FakeEngine(token_seconds=0.01)
    server = start(engine, max_queued_requests=1)
    stream = server.openai.completions.create(model="tiny", prompt="a", max_tokens=200, stream=True)
    next(iter(stream))
    assert server.service.admission.num_waiting == 0
    assert server.complete(max_tokens=1).status_code == 200
    stream.close()


def test_token_budget_is_429(start):
    engine = FakeEngine(hold=True)
    server = start(engine, max_queued_tokens=20)
    thread = threading.Thread(target=lambda: server.complete(prompt=[5] * 15))
    thread.start()
    wait_until(lambda: bool(engine.running), "the request did not reach the engine")
    response = server.complete(prompt=[5] * 6)
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "token_budget"
    assert server.service.admission.num_waiting == 1
    engine.hold = False
    thread.join()
    assert server.service.admission.waiting_tokens == 0


def test_room_is_given_back_after_every_kind_of_end(start):
    server = start(FakeEngine(), max_queued_requests=2)
    for fields in ({}, {"prompt": ""}, {"prompt": [5] * 300}, {"n": 2}, {"stream": True}, {"prompt": [600]}):
        server.complete(**fields)
        assert server.service.admission.num_waiting == 0
        assert server.service.admission.waiting_tokens == 0
