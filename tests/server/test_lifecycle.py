"""Loading, ready, draining, stalled, lost: what each route says meanwhile."""

import threading
import time

import openai
import pytest

from anybit.engine.errors import CheckpointError
from anybit.engine.types import EngineState
from tests.server.fake_engine import FakeEngine
from tests.waiting import wait_until


def status(server, path: str) -> tuple[int, str]:
    response = server.http.get(path)
    assert set(response.json()) == {"status"}
    return response.status_code, response.json()["status"]


def test_ready_server(server):
    assert status(server, "/health") == (200, "ok")
    assert status(server, "/ready") == (200, "ready")
    assert server.metric("anybit_ready") == 1


def test_loading_server_is_healthy_and_refuses(start):
    engine = FakeEngine(loading=True)
    server = start(engine, wait=False)
    assert status(server, "/health") == (200, "loading")
    assert status(server, "/ready") == (503, "loading")
    for response in (server.complete(), server.chat(stream=True), server.http.get("/v1/models")):
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "unavailable_error"
        assert response.json()["error"]["code"] == "loading"
    # Refused before the body is looked at.
    assert server.complete(n=10_000).status_code == 503
    version = server.http.get("/version").json()
    assert version["reproducible"] is None
    assert version["bit_widths"] == []
    assert server.metric("anybit_ready") == 0
    assert server.metric("anybit_rejections_total", reason="loading") == 3
    engine.loading = False
    server.wait_ready()
    assert server.complete().status_code == 200
    version = server.http.get("/version").json()
    assert version["reproducible"] is True
    assert version["kv_layers_raised"] == {"qet4": [0, 3]}


def test_failed_load_is_told_and_unhealthy(start):
    error = CheckpointError("The checkpoint is damaged; fetch it again.")
    server = start(FakeEngine(load_error=error), wait=False)
    wait_until(lambda: server.load_failures == [error], "nobody was told")
    assert status(server, "/health") == (503, "lost")
    assert status(server, "/ready") == (503, "lost")
    assert server.complete().status_code == 503


def test_missing_tokenizer_fails_before_the_weights_are_there(start, tmp_path):
    server = start(FakeEngine(loading=True), wait=False, checkpoint=tmp_path)
    wait_until(lambda: bool(server.load_failures), "nobody was told")
    assert "There is no tokenizer.json" in str(server.load_failures[0])


@pytest.mark.parametrize("state", [EngineState.LOST, EngineState.STALLED])
def test_engine_that_is_gone(start, state):
    server = start(FakeEngine())
    server.engine.state = state
    assert status(server, "/health") == (503, state.value)
    assert status(server, "/ready") == (503, state.value)
    with pytest.raises(openai.InternalServerError) as caught:
        server.openai.completions.create(model="tiny", prompt="a")
    assert caught.value.status_code == 503
    server.engine.state = EngineState.READY
    assert status(server, "/health") == (200, "ok")


def test_silent_engine_counts_as_stalled(start):
    server = start(FakeEngine(), stall_seconds=5)
    server.engine.silent_seconds = 4
    assert status(server, "/health") == (200, "ok")
    server.engine.silent_seconds = 6
    assert status(server, "/health") == (503, "stalled")
    assert server.complete().status_code == 503


def drain(server) -> threading.Thread:
    """Drain from outside, as a signal handler would."""
    import asyncio

    loop = server.engine.loop
    thread = threading.Thread(target=lambda: asyncio.run_coroutine_threadsafe(server.service.drain(), loop).result(10))
    thread.start()
    return thread


def test_drain_finishes_what_runs_and_refuses_the_rest(start):
    server = start(FakeEngine(token_seconds=0.02))
    stream = server.openai.completions.create(model="tiny", prompt="a", max_tokens=30, stream=True)
    first = next(iter(stream))
    thread = drain(server)
    wait_until(lambda: not server.service.ready, "still ready")
    assert status(server, "/health") == (200, "draining")
    assert status(server, "/ready") == (503, "draining")
    response = server.complete()
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"
    assert 1 + len(list(stream)) == 30
    assert first.id
    thread.join(10)
    assert server.engine.drained
    assert server.engine.aborted == []


def test_drain_that_runs_out_of_time_ends_what_runs(start):
    server = start(FakeEngine(token_seconds=0.05), drain_timeout_seconds=0.1)
    stream = server.openai.completions.create(model="tiny", prompt="a", max_tokens=200, stream=True)
    next(iter(stream))
    began = time.monotonic()
    thread = drain(server)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    thread.join(10)
    assert time.monotonic() - began < 3


def test_end_of_the_server_closes_the_engine(checkpoint):
    from tests.server.live_server import LiveServer

    server = LiveServer(FakeEngine(), checkpoint)
    server.stop()
    assert server.engine.closed


def test_server_that_ends_while_loading_closes_the_engine(checkpoint):
    from tests.server.live_server import LiveServer

    server = LiveServer(FakeEngine(loading=True), checkpoint, wait=False)
    server.stop()
    assert server.engine.closed
    assert server.load_failures == []


def test_models_are_listed_with_one_alias_per_width(server):
    cards = {card.id: card for card in server.openai.models.list().data}
    assert list(cards) == ["tiny", "tiny@2bit", "tiny@3bit", "tiny@4bit", "tiny@8bit"]
    card = cards["tiny@3bit"].model_dump()
    assert card["owned_by"] == "anybit"
    assert card["object"] == "model"
    assert (card["bit_width"], card["effective_bits"], card["bytes_read_per_token"]) == (3, 3.25, 3000)
    assert card["max_model_len"] == 256
    assert cards["tiny"].model_dump()["bit_width"] == 4


def test_one_model_is_shown(server):
    assert server.openai.models.retrieve("tiny@8bit").model_dump()["bit_width"] == 8
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("tiny@5bit")
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("someone/else")
