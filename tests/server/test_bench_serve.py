"""The load generator against servers of another make: what it sends, what it leaves out, how it counts what fails."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from anybit.server.bench.load import Load
from anybit.server.bench.run import BenchError, BenchSettings, bench_serve
from anybit.server.bench.target import Target, TargetError, normalize_base_url
from anybit.server.bench.workload import Workload
from tests.server.fake_engine import FakeEngine
from tests.server.foreign_server import STREAM_HEAD, ForeignServer, Reply, Script, answer, event, whole
from tests.server.live_server import LiveServer

SETTINGS = BenchSettings(
    requests=6, loads=(Load("concurrency", 3),), max_tokens=4, timeout_seconds=20, workload=Workload(1, 8)
)


def measure(
    script: Script, settings: BenchSettings = SETTINGS, model: str | None = None, key: str | None = None, **fields: Any
) -> tuple[dict[str, Any], ForeignServer]:
    """The report on a server that answers by `script`, and that server."""

    async def run() -> tuple[dict[str, Any], ForeignServer]:
        async with ForeignServer(script, **fields) as server:
            return await bench_serve(normalize_base_url(server.url), key, model, settings), server

    return asyncio.run(run())


def failing_at(number: int, how: Script) -> Script:
    """Every request from the `number`th on fails; the warm-up is the first."""
    count = 0

    def script(body: dict[str, Any]) -> Reply:
        nonlocal count
        count += 1
        return answer(body) if count < number else how(body)

    return script


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_foreign_server_gets_one_row_without_a_width(endpoint: Any) -> None:
    report, server = measure(answer, replace(SETTINGS, endpoint=endpoint, bit_width="all", rounds=2))
    (row,) = report["rows"]
    assert (row["bit_width"], row["requests"], row["completed"], row["failed"]) == (None, 12, 12, {})
    assert (row["prompt_tokens"], row["generated_tokens"]) == (132, 48)
    assert row["ttft_ms"]["p50"] <= row["latency_ms"]["p50"]
    assert report["model"] == "their-model"
    assert report["server"] is None
    assert report["settings"]["refused_fields"] == []
    json.dumps(report, allow_nan=False)
    assert len(server.bodies) == 1 + 12
    assert all("bit_width" not in body for body in server.bodies)
    prompts = {body["messages"][0]["content"] if endpoint == "chat" else body["prompt"] for body in server.bodies}
    assert len(prompts) == len(server.bodies)  # a prompt that came back would be answered from a prefix cache
    route = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
    assert sum(head.startswith(f"POST {route} ") for head in server.heads) == len(server.bodies)


def test_body_asks_for_a_comparable_answer_and_its_usage() -> None:
    _, server = measure(answer, model="second", key="sesame")
    body = server.bodies[-1]
    fields = {"model": "second", "max_tokens": 4, "temperature": 0, "stream": True, "ignore_eos": True}
    assert fields.items() <= body.items()
    assert body["stream_options"] == {"include_usage": True}
    assert all("authorization: bearer sesame" in head.lower() for head in server.heads)


@pytest.mark.parametrize("status", [400, 422])
def test_refused_fields_are_left_out_and_named(status: int) -> None:
    async def picky(body: dict[str, Any]) -> Reply:
        for name in ("stream_options", "ignore_eos"):
            if name in body:
                yield whole(status, {"error": {"message": f"Unrecognized request argument supplied: {name}"}})
                return
        async for piece in answer(body):
            yield piece

    report, server = measure(picky)
    (row,) = report["rows"]
    assert (row["completed"], row["failed"]) == (6, {})
    assert (row["prompt_tokens"], row["generated_tokens"]) == (None, 24)
    assert sorted(report["settings"]["refused_fields"]) == ["ignore_eos", "stream_options"]
    assert len(server.bodies) == 3 + 6  # the warm-up found out, and it was remembered


async def _status_429(body: dict[str, Any]) -> Reply:
    yield whole(429, {"error": {"message": "full"}})


async def _status_500(body: dict[str, Any]) -> Reply:
    yield whole(502, b"<html>bad gateway</html>")


async def _status_404(body: dict[str, Any]) -> Reply:
    yield whole(404, {"detail": "unknown model"})


async def _silence(body: dict[str, Any]) -> Reply:
    yield STREAM_HEAD
    await asyncio.sleep(5)


async def _hang_up(body: dict[str, Any]) -> Reply:
    yield STREAM_HEAD + event({"choices": [{"text": "x"}]})


async def _error_event(body: dict[str, Any]) -> Reply:
    yield STREAM_HEAD + event({"choices": [{"text": "x"}]}) + event({"error": {"message": "lost"}}) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("how", "kind", "telling"),
    [
        (_status_429, "429", "Status 429: full"),
        (_status_500, "5xx", "Status 502: <html>bad gateway</html>"),
        (_status_404, "4xx", "Status 404: unknown model"),
        (_silence, "timeout", "within 0.3 s"),
        (_hang_up, "connection", "closed"),
        (_error_event, "answer", "lost"),
    ],
)
def test_failures_are_counted_by_kind(how: Script, kind: str, telling: str) -> None:
    report, _ = measure(failing_at(4, how), replace(SETTINGS, timeout_seconds=0.3))
    (row,) = report["rows"]
    assert (row["requests"], row["completed"], row["failed"]) == (6, 2, {kind: 4})
    assert telling in row["messages"][kind]
    assert row["generated_tokens"] == 8


def test_no_answer_at_all_is_one_sentence() -> None:
    with pytest.raises(BenchError, match=r"^None of 6 requests was answered: Status 429: full\.$"):
        measure(_status_429)


def test_width_that_the_server_does_not_list_is_refused() -> None:
    with pytest.raises(TargetError, match="bit-width 4 for their-model; it has none to choose from"):
        measure(answer, replace(SETTINGS, bit_width="4"))


def test_model_by_name_needs_no_list() -> None:
    report, _ = measure(answer, model="hidden", models=None)
    assert report["model"] == "hidden"


@pytest.mark.parametrize(
    ("models", "telling"),
    [(None, "answered 404: no such route"), ({"data": []}, "--model"), ([1], "OpenAI-compatible")],
)
def test_missing_model_is_one_sentence(models: Any, telling: str) -> None:
    with pytest.raises(TargetError, match=telling):
        measure(answer, models=models)


def test_widths_come_from_the_aliases_of_the_model() -> None:
    target = Target("m", [2, 4, 8], None)
    assert target.choose("all") == [2, 4, 8]
    assert target.choose("") == [None]
    assert target.choose("8,2,8") == [2, 8]
    assert Target("m", [], None).choose("all") == [None]


@pytest.mark.parametrize("given", ["http://host:1", "http://host:1/", "http://host:1/v1", " http://host:1/v1/ "])
def test_base_url_may_end_anywhere(given: str) -> None:
    assert normalize_base_url(given) == "http://host:1/v1"


def test_base_url_keeps_its_path() -> None:
    assert normalize_base_url("https://host/models/a/v1/") == "https://host/models/a/v1"


@pytest.mark.parametrize(
    "given", ["", "host:8000", "ftp://host", "http://", "http://host:port", "http://me:secret@host"]
)
def test_other_base_url_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        normalize_base_url(given)


def test_closed_loop_keeps_so_many_in_flight() -> None:
    async def slow(body: dict[str, Any]) -> Reply:
        async for piece in answer(body, 0.005):
            yield piece

    _, server = measure(slow, replace(SETTINGS, requests=9))
    assert server.most_running == 3


def test_infinite_rate_is_written_as_json() -> None:
    report, _ = measure(answer, replace(SETTINGS, loads=(Load("request_rate", float("inf")),)))
    assert report["settings"]["request_rate"] == "inf"
    assert report["settings"]["concurrency"] is None
    assert report["rows"][0]["completed"] == 6
    json.dumps(report, allow_nan=False)


def test_one_load_is_written_as_a_number_and_several_as_a_list() -> None:
    one, several = (Load("concurrency", 3),), (Load("request_rate", 0.5), Load("request_rate", float("inf")))
    for loads, concurrency, rate in ((one, 3, None), (several, None, [0.5, "inf"])):
        settings = replace(SETTINGS, loads=loads).to_json()
        assert (settings["concurrency"], settings["request_rate"]) == (concurrency, rate)


def test_widths_take_turns_at_each_load_with_the_same_prompts(start: Callable[..., LiveServer]) -> None:
    engine = FakeEngine()
    server = start(engine)
    loads = (Load("concurrency", 1), Load("concurrency", 3))
    settings = replace(SETTINGS, bit_width="2,8", loads=loads, rounds=2, requests=3, warm_up=0)
    report = asyncio.run(bench_serve(normalize_base_url(server.url), None, None, settings))
    assert [(row["bit_width"], row["concurrency"], row["request_rate"]) for row in report["rows"]] == [
        (2, 1, None), (2, 3, None), (8, 1, None), (8, 3, None),
    ]  # fmt: skip
    assert {(row["requests"], row["completed"]) for row in report["rows"]} == {(6, 6)}
    asked = [(request.precision.bit_width, tuple(request.prompt_token_ids)) for request in engine.requests]
    blocks = [asked[start : start + 3] for start in range(0, len(asked), 3)]
    assert [{width for width, _ in block} for block in blocks] == [{2}, {8}] * 4  # load after load, round after round
    prompts = [{prompt for _, prompt in block} for block in blocks]
    assert prompts[::2] == prompts[1::2]
    assert len(set.union(*prompts)) == 4 * 3  # none comes back, or a prefix cache would answer


def test_own_server_tells_what_its_widths_cost(start: Callable[..., LiveServer]) -> None:
    server = start(api_keys=("sesame",))
    report = asyncio.run(bench_serve(normalize_base_url(server.url), "sesame", None, replace(SETTINGS, bit_width="2")))
    resources = report["resources"]
    assert resources["weights_bytes"] == {"linear": 8000, "embedding": 2000, "norm": 10}
    assert resources["widths"][0] == {
        "bit_width": 2, "effective_bits": 2.25, "equivalent_bytes": 2400, "bytes_read_per_token": 2000,
    }  # fmt: skip
    assert [row["bit_width"] for row in resources["widths"]] == [2, 3, 4, 8]
    assert resources["kv_formats"][1] == {"kv_format": "qet4", "bytes_per_token": 17.5, "capacity_tokens": 8192}
    assert resources["live_quality"] == []


def test_foreign_server_tells_nothing_of_its_memory() -> None:
    assert measure(answer)[0]["resources"] is None


def test_own_server_lists_its_widths_and_wants_its_key(start: Callable[..., LiveServer]) -> None:
    server = start(api_keys=("sesame",))
    settings = replace(SETTINGS, bit_width="all")
    report = asyncio.run(bench_serve(normalize_base_url(server.url), "sesame", None, settings))
    assert [(row["bit_width"], row["completed"]) for row in report["rows"]] == [(2, 6), (3, 6), (4, 6), (8, 6)]
    assert [row["generated_tokens"] for row in report["rows"]] == [24] * 4
    assert report["server"]["default_bit_width"] == 4
    with pytest.raises(TargetError, match="--api-key"):
        asyncio.run(bench_serve(normalize_base_url(server.url), "other", None, settings))
