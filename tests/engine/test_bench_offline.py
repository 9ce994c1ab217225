"""Whole requests kept in flight without HTTP, on a tiny model."""

import json

import pytest

from anybit.engine.bench.offline import OfflineAnswer, OfflineResult, keep_in_flight, warm_core
from anybit.engine.config import EngineConfig
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import NestedLoader
from anybit.server.bench.offline import OfflineSettings, bench_offline
from anybit.server.bench.run import BenchError
from anybit.server.bench.workload import Workload
from anybit.server.tokenizer import load_tokenizer
from tests.fixtures.engine import make_core, make_request, run
from tests.fixtures.tiny_llama import decoder_of


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    return decoder_of(config, NestedLoader(CheckpointReader(tiny_checkpoint), (2, 4), 8))


class WatchedCore:
    """Notes how many requests are in flight at each step, and what was asked."""

    def __init__(self, core):
        self._core = core
        self.added = []
        self.in_flight = []

    def add(self, request):
        self.added.append(request)
        return self._core.add(request)

    def step(self):
        self.in_flight.append(len(self._core._scheduler.sequences()))
        return self._core.step()


def test_so_many_requests_are_in_flight_until_none_is_left_to_send(decoder):
    core = WatchedCore(make_core(decoder))
    prompts = [list(range(5, 20 + 9 * index)) for index in range(7)]
    ended = []
    result = keep_in_flight(core, prompts, 2, max_tokens=6, concurrency=3, done=lambda: ended.append(len(core.added)))
    assert core.in_flight[0] == max(core.in_flight) == 3
    assert core.in_flight == sorted(core.in_flight, reverse=True)  # only at the end fewer
    assert ended == sorted(ended)
    assert len(ended) == len(core.added) == 7
    assert [request.prompt_token_ids for request in core.added] == prompts
    assert {request.precision.bit_width for request in core.added} == {2}
    assert [answer.num_prompt_tokens for answer in result.answers] == list(map(len, prompts))
    for answer in result.answers:
        assert len(answer.moments) == 6
        assert 0 < answer.moments[0] <= answer.moments[-1] < result.seconds
        assert answer.moments == sorted(answer.moments)


def test_answers_go_on_past_the_end_of_text(decoder):
    prompt = list(range(10, 30))
    (first, *_) = run(make_core(decoder), [make_request("a", prompt, 3)])["a"]
    assert run(make_core(decoder), [make_request("a", prompt, 3, stop_token_ids=(first,))])["a"] == []
    (answer,) = keep_in_flight(make_core(decoder), [prompt], 4, 3, 1).answers
    assert len(answer.moments) == 3


def test_a_request_that_cannot_run_makes_room_for_the_next(decoder):
    result = keep_in_flight(make_core(decoder, max_model_len=50), [[5] * 49, [5] * 10, [5] * 60], 4, 4, 1)
    assert [answer.error is None for answer in result.answers] == [False, True, False]
    assert "does not fit the context of 50" in result.answers[0].error
    assert len(result.answers[1].moments) == 4


def settings(**changes):
    workload = Workload(seed=3, prompt_tokens=12)
    return OfflineSettings((2, 4), **{"requests": 3, "rounds": 2, "warm_up": 1, "workload": workload, **changes})


def test_rounds_ask_what_bench_serve_asks(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    asked = []
    told = []

    def respond(prompts, width, done):
        asked.append((width, prompts))
        for _ in prompts:
            done()
        answers = [OfflineAnswer(len(prompt), 0.0, [0.1, 0.2, 0.3]) for prompt in prompts]
        return OfflineResult(answers, 2.0, 0.5)

    rows = bench_offline(respond, tokenizer, settings(), lambda done, total: told.append((done, total)))
    workload = settings().workload
    expected = [tokenizer._encode(text, True) for text in workload.prompts(0, 7)]
    warm_up, first, second = expected[:1], expected[1:4], expected[4:]
    rounds = [warm_up, warm_up, first, first, second, second]
    assert asked == [(width, prompts) for width, prompts in zip((2, 4) * 3, rounds, strict=True)]
    assert told == [(count, 12) for count in range(1, 13)]
    assert [row["bit_width"] for row in rows] == [2, 4]
    for row in rows:
        assert (row["requests"], row["completed"], row["failed"]) == (6, 6, {})
        assert (row["seconds"], row["generated_tokens"], row["tokens_per_second"]) == (4.0, 18, 4.5)
        assert row["prompt_tokens"] == sum(map(len, [*first, *second]))
        assert row["ttft_ms"]["p50"] == pytest.approx(100)
        assert row["itl_ms"]["p50"] == pytest.approx(100)


def test_no_answer_at_all_is_told_in_a_sentence(tiny_checkpoint):
    def respond(prompts, width, done):
        answers = [OfflineAnswer(len(prompt), 0.0, error="The prompt is too long.") for prompt in prompts]
        return OfflineResult(answers, 1.0, 0.5)

    with pytest.raises(BenchError, match=r"^No request was answered: The prompt is too long\.$"):
        bench_offline(respond, load_tokenizer(tiny_checkpoint), settings())


def test_a_checkpoint_is_measured(tiny_checkpoint):
    core, info = warm_core(EngineConfig(str(tiny_checkpoint), "tiny", bit_widths=(2, 4), device="cpu", threads=1))
    rows = bench_offline(
        lambda prompts, width, done: keep_in_flight(core, prompts, width, 5, 2, done),
        load_tokenizer(tiny_checkpoint),
        settings(max_tokens=5, concurrency=2),
    )
    assert info.bit_widths == [2, 4]
    assert [row["generated_tokens"] for row in rows] == [30, 30]
    assert core.take_stats().kv_pages_used == 0
