"""A real engine process behind the client: answers, aborts, draining, failures, and nothing left behind."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from anybit.engine.config import ConfigError, EngineConfig
from anybit.engine.errors import AnyBitError, EngineDrainingError, EngineLoadingError, EngineLostError
from anybit.engine.logs import LogSettings
from anybit.engine.process_client import ProcessEngine
from anybit.engine.types import EngineState, FinishReason
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import NestedLoader
from tests.fixtures.engine import make_core, make_request, run
from tests.fixtures.sentences import assert_one_sentence
from tests.fixtures.tiny_llama import decoder_of

WIDTHS = (2, 4, 8)
PROMPT = list(range(10, 50))


def engine_config(checkpoint) -> EngineConfig:
    return EngineConfig(
        str(checkpoint), "tiny", bit_widths=WIDTHS, device="cpu", threads=1, max_num_seqs=4, max_step_tokens=64
    )


def long_request(name="long"):
    """Seconds of work."""
    return make_request(name, PROMPT, 470)


@pytest.fixture(scope="module", autouse=True)
def slow_engines():
    """Portable kernels: natively the tiny model would be done before anybody could stop, kill or drain it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYBIT_CPU_KERNELS", "none")
        yield


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def start(loop, tiny_checkpoint):
    """Starts engines that the test may break; each takes seconds."""
    engines = []

    async def started(checkpoint, **settings) -> ProcessEngine:
        engine = ProcessEngine(engine_config(checkpoint), logs=LogSettings("ERROR"), **settings)
        engines.append(engine)
        await engine.start()
        return engine

    yield lambda checkpoint=tiny_checkpoint, **settings: loop.run(started(checkpoint, **settings))
    for engine in engines:
        loop.run(engine.close())


@pytest.fixture(scope="module")
def engine(loop, tiny_checkpoint):
    """One engine for all tests that leave it as they found it."""
    engine = ProcessEngine(engine_config(tiny_checkpoint), logs=LogSettings("ERROR"))
    loop.run(engine.start())
    loop.run(engine.wait_ready())
    yield engine
    loop.run(engine.close())


async def collect(engine, request):
    return [event async for event in engine.generate(request)]


async def first_events(engine, request, count=2):
    """The iterator after `count` events."""
    events = engine.generate(request)
    for _ in range(count):
        await anext(events)
    return events


async def until(engine, condition, seconds=5.0):
    """Wait until the engine's newest report meets a condition."""
    end = time.monotonic() + seconds
    while not condition(engine.stats()):
        assert time.monotonic() < end, engine.stats()
        await asyncio.sleep(0.01)


def is_free(stats):
    return stats.kv_pages_used == 0 and not stats.running and not stats.waiting


async def until_running_alone(engine):
    """Returns the steps taken so far."""
    await until(engine, lambda stats: stats.kv_pages_used)
    assert engine.stats().running == {4: 1}
    return engine.stats().steps


async def until_full(engine):
    await until(engine, lambda stats: stats.running == {4: 4})


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_engine_says_what_it_serves(engine):
    assert engine.model.name == "tiny"
    assert engine.model.bit_widths == list(WIDTHS)
    assert engine.model.eos_token_ids == [0, 1]
    assert engine.health().state is EngineState.READY


def test_engine_gives_every_width_the_answer_of_a_core_in_this_process(loop, engine, tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    decoder = decoder_of(config, NestedLoader(CheckpointReader(tiny_checkpoint), WIDTHS, 8, native=False))
    requests = [
        make_request(f"{width}-{seed}", PROMPT, 8, width, temperature=seed * 1.0, seed=seed)
        for width in WIDTHS
        for seed in (0, 1)
    ]
    expected = run(make_core(decoder), requests)
    assert len({tuple(tokens) for tokens in expected.values()}) == len(requests)

    async def together():
        return await asyncio.gather(*(collect(engine, request) for request in requests))

    for request, events in zip(requests, loop.run(together()), strict=True):
        assert [token for event in events for token in event.token_ids] == expected[request.request_id]
        assert [event.finish_reason for event in events[-2:]] == [None, FinishReason.LENGTH]
        assert events[0].queue_seconds >= 0
        assert events[0].prefill_seconds > 0
    loop.run(until(engine, is_free))


def test_prompt_longer_than_a_step_is_answered(loop, engine):
    events = loop.run(collect(engine, make_request("a", [7] * 150, 2)))
    assert [event.finish_reason for event in events] == [None, FinishReason.LENGTH], events[-1].error


def test_stats_grow_with_the_work(loop, engine):
    loop.run(asyncio.sleep(0.3))  # what earlier tests did has been reported
    engine.take_step_tokens()
    before = engine.stats()
    loop.run(collect(engine, make_request("a", PROMPT, 5, 2)))
    loop.run(until(engine, lambda stats: stats.steps == before.steps + 5))
    after = engine.stats()
    assert engine.take_step_tokens() == [len(PROMPT), 1, 1, 1, 1]
    assert engine.take_step_tokens() == []
    per_token = engine.model.widths[0].bytes_read_per_token
    assert after.weight_bytes_read[2] == before.weight_bytes_read.get(2, 0) + 5 * per_token
    assert after.resident_bytes > 50_000_000


def test_abort_ends_the_iterator_and_frees_the_pages(loop, engine):
    async def scenario():
        events = await first_events(engine, long_request())
        await until_running_alone(engine)
        await engine.abort("long")
        rest = [event async for event in events]
        await until(engine, is_free)
        return rest

    rest = loop.run(scenario())
    assert rest[-1].finish_reason is FinishReason.ABORT
    loop.run(engine.abort("long"))  # finished: ignored
    assert engine.health().state is EngineState.READY


def test_closing_the_iterator_aborts_the_request(loop, engine):
    async def scenario():
        events = await first_events(engine, long_request())
        steps = await until_running_alone(engine)
        await events.aclose()
        await until(engine, is_free)
        assert engine.stats().steps - steps < 300  # of 470

    loop.run(scenario())


def test_cancelled_waiting_aborts_the_request(loop, engine):
    async def scenario():
        task = asyncio.create_task(collect(engine, long_request()))
        steps = await until_running_alone(engine)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(engine, is_free)
        assert engine.stats().steps - steps < 300  # of 470

    loop.run(scenario())


@pytest.mark.parametrize(
    ("request_", "parts"),
    [
        (make_request("a", PROMPT, 5, 3), ("Bit-width 3", "not loaded")),
        (make_request("a", PROMPT, 500), ("512",)),
    ],
    ids=["width", "length"],
)
def test_request_that_cannot_run_ends_with_an_error_event(loop, engine, request_, parts):
    (event,) = loop.run(collect(engine, request_))
    assert event.finish_reason is FinishReason.ERROR
    assert_one_sentence(event.error, *parts)
    assert engine.health().state is EngineState.READY


def test_bad_settings_are_refused_before_anything_starts(tiny_checkpoint):
    with pytest.raises(ConfigError):
        ProcessEngine(replace(engine_config(tiny_checkpoint), max_num_seqs=-1))


def test_engine_that_was_not_started_says_so(loop, tiny_checkpoint):
    engine = ProcessEngine(engine_config(tiny_checkpoint))
    with pytest.raises(EngineLoadingError):
        loop.run(engine.wait_ready())
    loop.run(engine.close())


def test_drain_waits_for_what_runs_and_close_leaves_no_process(loop, start):
    engine = start()
    assert engine.health().state is EngineState.LOADING
    with pytest.raises(EngineLoadingError) as caught:
        loop.run(collect(engine, long_request()))
    assert str(caught.value).endswith(".")

    async def scenario():
        await engine.wait_ready()
        running = asyncio.create_task(collect(engine, make_request("a", PROMPT, 30)))
        await asyncio.sleep(0)
        draining = asyncio.create_task(engine.drain(20))
        await asyncio.sleep(0)
        assert engine.health().state is EngineState.DRAINING
        with pytest.raises(EngineDrainingError):
            await collect(engine, make_request("b", PROMPT, 1))
        await draining
        return await running

    events = loop.run(scenario())
    assert len([token for event in events for token in event.token_ids]) == 30
    assert events[-1].finish_reason is FinishReason.LENGTH
    process = engine._process
    loop.run(engine.close())
    assert process.returncode == 0  # it ended by itself
    assert not is_alive(process.pid)
    loop.run(engine.close())
    with pytest.raises(EngineLostError):
        loop.run(collect(engine, long_request()))


def test_drain_aborts_what_is_left_when_its_time_is_up(loop, start):
    engine = start()

    async def scenario():
        await engine.wait_ready()
        running = [asyncio.create_task(collect(engine, long_request(f"long {index}"))) for index in range(6)]
        await until_full(engine)
        await engine.drain(0.05)
        return await asyncio.gather(*running)

    answers = loop.run(scenario())
    assert [events[-1].finish_reason for events in answers] == [FinishReason.ABORT] * 6
    loop.run(until(engine, is_free))


def test_stopped_and_killed_engine_is_stalled_and_lost(loop, start):
    engine = start(stall_seconds=0.5)

    async def scenario():
        await engine.wait_ready()
        waiting = [asyncio.create_task(collect(engine, long_request(f"long {index}"))) for index in range(6)]
        await until_full(engine)
        os.kill(engine._process.pid, signal.SIGSTOP)
        await asyncio.sleep(0.7)
        stalled = engine.health()
        os.kill(engine._process.pid, signal.SIGKILL)
        return stalled, await asyncio.gather(*waiting, return_exceptions=True)

    stalled, results = loop.run(scenario())
    assert stalled.state is EngineState.STALLED
    assert_one_sentence(stalled.detail)
    assert [type(result) for result in results] == [EngineLostError] * 6
    assert_one_sentence(results[0], "ended unexpectedly")
    assert engine.health().state is EngineState.LOST
    with pytest.raises(EngineLostError):
        loop.run(collect(engine, long_request()))
    loop.run(engine.abort("long 1"))
    loop.run(engine.drain(1))
    loop.run(engine.close())
    assert not is_alive(engine._process.pid)


def test_checkpoint_that_is_damaged_is_told_by_wait_ready(loop, start, checkpoint_copy):
    path = next(checkpoint_copy.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    engine = start(checkpoint_copy)
    with pytest.raises(AnyBitError) as caught:
        loop.run(engine.wait_ready())
    assert_one_sentence(caught.value, path.name, "SHA-256")
    assert engine.health().state is EngineState.LOST
    assert engine.health().detail == str(caught.value)
    assert engine.model is None
    loop.run(engine.close())
    assert not is_alive(engine._process.pid)
