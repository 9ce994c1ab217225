"""One engine hands over to another while requests run: nothing is lost, nothing is answered twice."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest

from anybit.engine.errors import EngineDrainingError
from anybit.engine.replaceable_engine import ReplaceableEngine
from anybit.engine.types import EngineState, EngineStats, FinishReason, GenerationRequest, TokenEvent
from tests.fixtures.engine import make_request
from tests.server.fake_engine import FakeEngine, model_info


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def make_engine(method: str, **settings: object) -> FakeEngine:
    return FakeEngine(replace(model_info(), method=method), **settings)  # type: ignore[arg-type]


def request(name: str, max_tokens: int = 20) -> GenerationRequest:
    return make_request(name, [5, 6, 7], max_tokens)


async def collect(events: AsyncIterator[TokenEvent]) -> tuple[list[int], FinishReason | None]:
    token_ids: list[int] = []
    reason = None
    async for event in events:
        token_ids += event.token_ids
        reason = event.finish_reason
    return token_ids, reason


def test_request_ends_where_it_began_and_the_next_begins_with_the_successor(loop: asyncio.Runner) -> None:
    old, new = make_engine("rtn", token_seconds=0.005), make_engine("best")

    async def scenario() -> None:
        engine = ReplaceableEngine(old)
        assert engine.model is not None
        assert engine.model.method == "rtn"
        running = asyncio.create_task(collect(engine.generate(request("first"))))
        await asyncio.sleep(0.02)
        assert old.running
        engine.hand_over(new)
        assert engine.model.method == "best"
        assert engine.health().state is EngineState.READY
        retiring = asyncio.create_task(engine.retire(10))
        await asyncio.sleep(0)
        assert old.state is EngineState.DRAINING
        assert engine.health().state is EngineState.READY
        assert await collect(engine.generate(request("second"))) == new.tokens(request("second"))
        assert not old.closed
        assert await running == old.tokens(request("first"))
        await retiring

    loop.run(scenario())
    assert old.closed
    assert not new.closed
    assert [sent.request_id for sent in old.requests] == ["first"]
    assert [sent.request_id for sent in new.requests] == ["second"]


def test_requests_sent_all_the_time_never_meet_an_engine_that_leaves(loop: asyncio.Runner) -> None:
    engines = [make_engine(str(number)) for number in range(5)]

    async def scenario() -> None:
        engine = ReplaceableEngine(engines[0])
        done = False
        count = 0

        async def ask() -> None:
            nonlocal count
            while not done:
                count += 1
                asked = request(str(count), max_tokens=3)
                assert await collect(engine.generate(asked)) == engines[0].tokens(asked)

        askers = [asyncio.create_task(ask()) for _ in range(8)]
        for successor in engines[1:]:
            await asyncio.sleep(0.01)
            engine.hand_over(successor)
            await engine.retire(10)
        done = True
        await asyncio.gather(*askers)

    loop.run(scenario())
    assert [engine.closed for engine in engines] == [True] * 4 + [False]
    assert all(engine.requests and not engine.aborted for engine in engines[:-1])


def test_abort_reaches_a_request_in_the_engine_that_leaves(loop: asyncio.Runner) -> None:
    old = make_engine("rtn", hold=True)

    async def scenario() -> tuple[list[int], FinishReason | None]:
        engine = ReplaceableEngine(old)
        running = asyncio.create_task(collect(engine.generate(request("a"))))
        await asyncio.sleep(0.01)
        engine.hand_over(make_engine("best"))
        retiring = asyncio.create_task(engine.retire(10))
        await asyncio.sleep(0.01)
        await engine.abort("a")
        await retiring
        return await running

    assert loop.run(scenario())[1] is FinishReason.ABORT


def test_counters_only_grow_and_what_is_held_is_held_once(loop: asyncio.Runner) -> None:
    old = make_engine("rtn", steps=[7, 1], hold=True)
    new = make_engine("best", steps=[3])
    old.snapshot = EngineStats(
        running={4: 1}, steps=10, weight_bytes_read={4: 100, 8: 0}, kernel_fallbacks={"linear:x": 2}, resident_bytes=50,
        kv_pages_total=8, preemptions=1, sealed_pages={"qet4": 5}, seal_seconds={"qet4": 0.5},
    )  # fmt: skip
    new.snapshot = EngineStats(
        running={8: 2}, steps=1, weight_bytes_read={4: 5, 8: 7}, resident_bytes=60, kv_pages_total=9,
        sealed_pages={"qet4": 2, "qet2": 1}, seal_seconds={"qet4": 0.25},
    )  # fmt: skip
    both = EngineStats(
        running={4: 1, 8: 2}, steps=11, weight_bytes_read={4: 105, 8: 7}, kernel_fallbacks={"linear:x": 2},
        resident_bytes=110, kv_pages_total=17, preemptions=1, sealed_pages={"qet4": 7, "qet2": 1},
        seal_seconds={"qet4": 0.75},
    )  # fmt: skip

    async def scenario() -> None:
        engine = ReplaceableEngine(old)
        assert engine.stats() == old.snapshot
        running = asyncio.create_task(collect(engine.generate(request("a"))))
        await asyncio.sleep(0.01)
        engine.hand_over(new)
        retiring = asyncio.create_task(engine.retire(10))
        await asyncio.sleep(0.01)
        assert engine.stats() == both
        old.hold = False
        await running
        await retiring
        assert engine.stats() == replace(both, running={8: 2}, resident_bytes=60, kv_pages_total=9)
        assert sum(engine.take_step_tokens()) == 3 + 8 + 20
        assert engine.take_step_tokens() == []

    loop.run(scenario())


def test_drain_and_close_reach_both_engines(loop: asyncio.Runner) -> None:
    old, new = make_engine("rtn", hold=True), make_engine("best", hold=True)

    async def scenario() -> None:
        engine = ReplaceableEngine(old)
        running = [asyncio.create_task(collect(engine.generate(request("a"))))]
        await asyncio.sleep(0.01)
        engine.hand_over(new)
        retiring = asyncio.create_task(engine.retire(10))
        running.append(asyncio.create_task(collect(engine.generate(request("b")))))
        await asyncio.sleep(0.01)
        retiring.cancel()
        await engine.drain(0.05)
        assert [reason for _, reason in await asyncio.gather(*running)] == [FinishReason.ABORT] * 2
        with pytest.raises(EngineDrainingError):
            engine.hand_over(make_engine("too late"))
        assert engine.model is new.info
        await engine.close()

    loop.run(scenario())
    assert old.closed
    assert new.closed


def test_retire_without_a_handover_does_nothing(loop: asyncio.Runner) -> None:
    old = make_engine("rtn")
    loop.run(ReplaceableEngine(old).retire(10))
    assert old.state is EngineState.READY


def test_memory_of_two_engines_adds_up_but_what_is_free_is_free_once(loop: asyncio.Runner) -> None:
    old, new = make_engine("rtn"), make_engine("best")
    old.snapshot = EngineStats(device_memory={"weights": 100, "workspace": 5}, device_free_bytes=900)
    new.snapshot = EngineStats(device_memory={"weights": 120, "workspace": 0}, device_free_bytes=880)
    engine = ReplaceableEngine(old)
    engine.hand_over(new)
    assert engine.stats().device_memory == {"weights": 220, "workspace": 5}
    assert engine.stats().device_free_bytes == 880
    loop.run(engine.retire(1))
    assert engine.stats().device_memory == {"weights": 120, "workspace": 0}
