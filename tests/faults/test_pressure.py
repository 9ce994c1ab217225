"""Random requests of every kind through a KV cache far too small: nobody's text changes, and nothing is left behind."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.endtoend.command import ServeCommand
from tests.endtoend.test_serving import wait_until_idle

pytestmark = pytest.mark.slow

NUM_REQUESTS = 300
NUM_TOGETHER = 80
WIDTHS = (2, 3, 4, 6, 8)
VOCABULARY = range(4, 512)


def random_body(rng: random.Random) -> dict[str, Any]:
    shared = random.Random(rng.randrange(3)).choices(VOCABULARY, k=200)  # three beginnings that many prompts share
    prompt = shared[: rng.choice((0, 0, 70, 150, 200))] + rng.choices(VOCABULARY, k=rng.choice((1, 5, 40, 120)))
    choices: dict[str, tuple[Any, ...]] = {
        "temperature": (0, 0.3, 1.0, 1.7),
        "top_p": (1, 0.5, 0.9),
        "top_k": (0, 5, 40),
        "min_p": (0, 0.1),
        "presence_penalty": (0, 1.2),
        "frequency_penalty": (0, 0.7),
        "repetition_penalty": (1, 1.3),
        "logit_bias": ({}, {"40": 3, "41": -100}),
        "n": (1, 1, 1, 2, 3),
        "logprobs": (None, 0, 3),
        "echo": (False, False, True),
        "stop": (None, ["e"], ["zz", " the"]),
        "ignore_eos": (True, False),
        "cache_salt": (None, None, "salt"),
        "stream": (True, False),
    }
    body = {name: rng.choice(values) for name, values in choices.items()}
    body |= {"prompt": prompt, "max_tokens": rng.choice((1, 20, 150, 190)), "bit_width": rng.choice(WIDTHS)}
    return body | {"seed": rng.randrange(1000)}


async def ask(client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None) -> dict[int, Any] | None:
    """The choices by index; None for a client that left after so many lines of a stream, or soon."""
    if leave_after is not None and not body["stream"]:
        try:
            async with asyncio.timeout(0.05 * leave_after):
                await client.post("/v1/completions", json=body)
        except TimeoutError:
            pass
        return None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise AssertionError((response.status_code, await response.aread()))
        if not body["stream"]:
            return whole_choices(json.loads(await response.aread()))
        found: dict[int, Any] = {}
        num_lines = 0
        async for line in response.aiter_lines():
            num_lines += 1
            if leave_after is not None and num_lines > leave_after:
                return None
            data = line.removeprefix("data: ")
            if data and data != "[DONE]":
                add_chunk(found, json.loads(data))
        return found


def whole_choices(answer: dict[str, Any]) -> dict[int, Any]:
    return {
        choice["index"]: (choice["text"], choice["finish_reason"], token_values(choice["logprobs"]))
        for choice in answer["choices"]
    }


def add_chunk(found: dict[int, Any], chunk: dict[str, Any]) -> None:
    for choice in chunk["choices"]:
        text, _, values = found.get(choice["index"], ("", None, []))
        found[choice["index"]] = (
            text + choice["text"],
            choice["finish_reason"],
            values + token_values(choice["logprobs"]),
        )


def token_values(logprobs: dict[str, Any] | None) -> list[Any]:
    return [] if logprobs is None else list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))


@pytest.fixture(scope="module")
def crowded(tiny_checkpoint: Path, cache: Path) -> Any:
    """16 pages for up to 16 sequences of up to 8 pages each."""
    with ServeCommand(tiny_checkpoint, "--kv-cache-mib", "0.25", "--log-level", "warning", cache=cache) as server:
        yield server


def test_every_text_is_what_it_is_alone_and_nothing_is_left_behind(crowded: ServeCommand) -> None:
    rng = random.Random(20261124)
    bodies = [random_body(rng) for _ in range(NUM_REQUESTS)]
    leaves = [rng.choice((None, None, None, 0, 3, 10)) for _ in bodies]

    async def together() -> list[dict[int, Any] | None]:
        room = asyncio.Semaphore(NUM_TOGETHER)

        async def one(body: dict[str, Any], leave_after: int | None) -> dict[int, Any] | None:
            async with room:
                return await ask(client, body, leave_after)

        async with httpx.AsyncClient(base_url=crowded.url, timeout=600, limits=httpx.Limits()) as client:
            return await asyncio.gather(*map(one, bodies, leaves))

    async def alone(kept: list[dict[str, Any]]) -> list[dict[int, Any] | None]:
        async with httpx.AsyncClient(base_url=crowded.url, timeout=600) as client:
            return [await ask(client, body | {"stream": False}, None) for body in kept]

    answers = asyncio.run(together())
    wait_until_idle(crowded)
    assert crowded.metric("anybit_requests_waiting") == 0
    assert crowded.metric("anybit_kv_cache_bytes", state="used") == 0
    assert crowded.metric("anybit_preemptions_total") > 0, "the cache was not too small"
    assert crowded.metric("anybit_prefix_cache_hit_tokens_total") > 0
    assert crowded.metric("anybit_requests_total", outcome="abort") > 0
    assert crowded.metric("anybit_requests_total", outcome="error") == 0

    finished = [(body, answer) for body, answer in zip(bodies, answers, strict=True) if answer is not None]
    assert len(finished) > NUM_REQUESTS / 2
    expected = asyncio.run(alone([body for body, _ in finished]))
    different = [body for (body, answer), wanted in zip(finished, expected, strict=True) if answer != wanted]
    assert not different, f"{len(different)} of {len(finished)} answers differ, the first for {different[0]}"
    assert crowded.metric("anybit_kv_cache_bytes", state="used") == 0
    assert httpx.get(f"{crowded.url}/health").status_code == 200  # a broken invariant would have ended the engine
    assert "Traceback" not in crowded.log
    assert "ERROR" not in crowded.log
