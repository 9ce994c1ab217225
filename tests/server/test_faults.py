"""Clients that leave, engines that break: the error in the right place, and nothing left behind."""

import json
import logging
import socket
import threading
import time

import httpx
import openai
import pytest

from anybit.engine.errors import CapacityError, EngineDrainingError, EngineLostError
from tests.server.fake_engine import FakeEngine
from tests.waiting import wait_until


def assert_nothing_left(server) -> None:
    wait_until(lambda: not server.engine.running, "sequences are left in the engine")
    wait_until(lambda: server.service.admission.num_waiting == 0, "the queue is not empty")
    assert server.service.admission.waiting_tokens == 0


def assert_serves_again(server) -> None:
    for name in ("fail_after", "lost_after", "abort_after", "ends_early_after", "crash_after", "refuse"):
        setattr(server.engine, name, None)
    server.engine.token_seconds = 0.0
    server.engine.hold = False
    assert server.complete().status_code == 200
    assert_nothing_left(server)


def events(response) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]


FAULTS = [
    ({"lost_after": 5}, 503, "engine_lost"),
    ({"ends_early_after": 5}, 503, "engine_lost"),
    ({"abort_after": 5}, 503, "draining"),
    ({"fail_after": 5}, 500, None),
    ({"crash_after": 5}, 500, None),
]


@pytest.mark.parametrize(("fault", "status", "code"), FAULTS)
@pytest.mark.parametrize("n", [1, 3])
def test_fault_in_a_whole_answer_is_an_error_response(start, fault, status, code, n):
    server = start(FakeEngine(**fault))
    response = server.complete(max_tokens=20, n=n)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers["x-bit-width"] == "4"
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert_nothing_left(server)
    assert_serves_again(server)


@pytest.mark.parametrize(("fault", "status", "code"), FAULTS)
@pytest.mark.parametrize("n", [1, 3])
def test_fault_in_a_stream_is_an_error_event_and_the_end(start, fault, status, code, n):
    server = start(FakeEngine(**fault))
    response = server.complete(max_tokens=20, n=n, stream=True)
    assert response.status_code == 200
    *chunks, last = events(response)
    assert set(last) == {"error"}
    assert last["error"]["code"] == code
    assert len(chunks) >= 5
    assert "[DONE]" not in response.text
    assert "secret" not in response.text
    assert server.metric("anybit_requests_total", outcome="error", bit_width="4") == n
    assert_serves_again(server)


def test_official_client_raises_on_an_error_event(start):
    server = start(FakeEngine(lost_after=3))
    stream = server.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    with pytest.raises(openai.APIError, match="The engine process ended"):
        list(stream)


def test_fault_before_the_first_event_is_an_error_response_even_for_a_stream(start):
    server = start(FakeEngine(lost_after=0))
    response = server.complete(stream=True)
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "unavailable_error"


@pytest.mark.parametrize(
    ("error", "status", "code", "reason"),
    [
        (CapacityError("The prompt needs more KV cache than there is."), 400, "context_length_exceeded", "too_long"),
        (EngineDrainingError("The engine is draining."), 503, "draining", "draining"),
        (EngineLostError("The engine process ended."), 503, "engine_lost", "unavailable"),
    ],
)
def test_refusal_of_the_engine(start, error, status, code, reason):
    server = start(FakeEngine(refuse=error))
    response = server.complete(n=2)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["message"] == str(error)
    assert server.metric("anybit_rejections_total", reason=reason) == 1
    assert server.metric("anybit_requests_total", outcome="rejected") == 2
    assert_serves_again(server)


def test_lost_engine_during_a_stream(start):
    from anybit.engine.types import EngineState

    server = start(FakeEngine(token_seconds=0.02))
    stream = server.openai.completions.create(model="tiny", prompt="a", max_tokens=200, stream=True)
    next(iter(stream))
    server.engine.state = EngineState.LOST
    with pytest.raises(openai.APIError, match="The engine process ended"):
        list(stream)
    assert server.http.get("/health").status_code == 503
    assert_nothing_left(server)


def test_unexpected_error_is_a_500_that_tells_nothing_and_is_logged(start, monkeypatch, caplog):
    server = start(FakeEngine())

    def fail(*args):
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(server.service, "require_model", fail)
    with caplog.at_level(logging.ERROR, "anybit.server"):
        response = server.complete()
    assert response.status_code == 500
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in response.text
    assert "a secret detail" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize("n", [1, 4])
def test_client_that_leaves_a_stream_aborts_its_sequences(start, n):
    server = start(FakeEngine(token_seconds=0.01))
    stream = server.openai.completions.create(model="tiny", prompt="a", max_tokens=240, n=n, stream=True)
    next(iter(stream))
    assert len(server.engine.running) == n
    stream.close()
    assert_nothing_left(server)
    assert len(set(server.engine.aborted)) == n
    assert server.metric("anybit_requests_total", outcome="abort") == n
    assert_serves_again(server)


@pytest.mark.parametrize("n", [1, 4])
def test_client_that_leaves_a_whole_answer_aborts_its_sequences(start, n):
    server = start(FakeEngine(token_seconds=0.01))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 240, "n": n}, timeout=0.2)
    assert_nothing_left(server)
    assert len(set(server.engine.aborted)) == n
    wait_until(lambda: server.metric("anybit_requests_total", outcome="abort") == n, "not counted")


def test_client_that_leaves_before_the_first_token_aborts_its_sequence(start):
    server = start(FakeEngine(hold=True))
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "stream": stream}, timeout=0.2)
    assert_nothing_left(server)
    assert len(server.engine.aborted) == 2


def test_storm_of_leaving_clients_leaves_nothing(start):
    server = start(FakeEngine(token_seconds=0.01))
    body = json.dumps({"prompt": "a", "max_tokens": 240, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    wait_until(lambda: len(server.engine.requests) == 50, "not all arrived")
    assert_nothing_left(server)
    assert_serves_again(server)


@pytest.mark.parametrize("stream", [False, True])
def test_answer_that_takes_too_long_is_given_up(start, stream):
    server = start(FakeEngine(token_seconds=0.02), request_timeout_seconds=0.3)
    response = server.complete(max_tokens=200, stream=stream)
    error = events(response)[-1]["error"] if stream else response.json()["error"]
    assert response.status_code == (200 if stream else 503)
    assert error["code"] == "request_timeout"
    assert_nothing_left(server)
    assert server.metric("anybit_requests_total", outcome="timeout") == 1


def test_client_that_stops_reading_is_given_up(start):
    server = start(FakeEngine(tokens_per_event=1), request_timeout_seconds=1.0)
    body = json.dumps({"prompt": ["a"] * 64, "max_tokens": 250, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    wait_until(lambda: len(server.engine.requests) == 64, "not all arrived")
    assert_nothing_left(server)
    connection.close()
    assert server.complete().status_code == 200


def test_neighbours_of_a_failing_request_go_on(start):
    server = start(FakeEngine(token_seconds=0.005))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.complete(max_tokens=60, seed=1)))
    thread.start()
    time.sleep(0.02)
    for fields in ({"n": 10_000}, {"prompt": [5] * 300}, {"bit_width": 7}, {"prompt": [600]}):
        assert server.complete(**fields).status_code == 400
    thread.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 60


def test_one_line_is_logged_per_request_without_its_text(start, caplog):
    server = start(FakeEngine())
    with caplog.at_level(logging.INFO, "anybit.server"):
        server.http.post(
            "/v1/completions", json={"prompt": "my private words", "max_tokens": 3}, headers={"X-Request-Id": "abc"}
        )
        wait_until(lambda: "request abc" in caplog.text, "nothing was logged")
    lines = [record.getMessage() for record in caplog.records if "request abc" in record.getMessage()]
    assert len(lines) == 1
    assert "width=4" in lines[0]
    assert "generated_tokens=3" in lines[0]
    assert "outcome=length" in lines[0]
    assert "private" not in caplog.text
