"""The two ways of sending: so many at a time, or at given times whatever comes back."""

import asyncio
from typing import Any

from anybit.server.bench.answer import Failure
from anybit.server.bench.load import closed_loop, open_loop


def test_open_loop_waits_for_no_answer() -> None:
    async def run() -> list[Any]:
        sent: list[str] = []
        everything_sent = asyncio.Event()

        async def ask(prompt: str) -> Failure:
            sent.append(prompt)
            if len(sent) == 3:
                everything_sent.set()
            await everything_sent.wait()
            return Failure("timeout", prompt)

        result = await open_loop(ask, ["a", "b", "c"], [0.0, 0.02, 0.04], lambda: None)
        assert sent == ["a", "b", "c"]
        assert result.seconds >= 0.04
        return result.outcomes

    assert len(asyncio.run(asyncio.wait_for(run(), 10))) == 3


def test_loops_report_every_request_as_done() -> None:
    async def ask(prompt: str) -> Failure:
        return Failure("timeout", prompt)

    done: list[int] = []
    asyncio.run(closed_loop(ask, ["a"] * 5, 2, lambda: done.append(1)))
    asyncio.run(open_loop(ask, ["a"] * 4, [0.0] * 4, lambda: done.append(1)))
    assert len(done) == 9
