"""POST /v1/completions with the official client: prompts, choices, seeds, streams, stop strings, usage."""

import json

import openai
import pytest

from tests.server.fake_engine import FakeEngine
from tests.waiting import wait_until

DETAILS = {"prompt_tokens_details": {"cached_tokens": 0}, "bit_width": 4}


def text_of(stream) -> str:
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def events(response) -> list[str]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_answer_has_the_documented_shape(server):
    answer = server.complete(max_tokens=5).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["system_fingerprint"].startswith("anybit-")
    assert answer["system_fingerprint"].endswith("-w4")
    assert set(answer["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7, **DETAILS}


def test_default_limit_is_16_tokens(server):
    assert server.complete().json()["usage"]["completion_tokens"] == 16


def test_default_limit_shrinks_to_what_the_context_leaves(server):
    assert server.complete(prompt=[5] * 250).json()["usage"]["completion_tokens"] == 6


def test_streamed_text_equals_whole_text(server):
    fields = {"model": "tiny", "prompt": "Hello world", "max_tokens": 60, "seed": 3}
    whole = server.openai.completions.create(**fields)
    streamed = server.openai.completions.create(**fields, stream=True)
    assert text_of(streamed) == whole.choices[0].text


def test_stream_sends_one_event_per_engine_event_and_ends_with_done(server):
    response = server.complete(max_tokens=7, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert len(chunks) == 7
    reasons = [json.loads(chunk)["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * 6 + ["length"]
    assert all(json.loads(chunk)["object"] == "text_completion" for chunk in chunks)


def test_stream_usage_comes_once_without_choices(server):
    response = server.complete(max_tokens=3, stream=True, stream_options={"include_usage": True})
    *chunks, last = [json.loads(event) for event in events(response)[:-1]]
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, **DETAILS}


def test_stream_without_usage_has_no_usage_field(server):
    assert all("usage" not in json.loads(event) for event in events(server.complete(stream=True))[:-1])


def test_continuous_usage_counts_up(server):
    response = server.complete(max_tokens=3, stream=True, stream_options={"continuous_usage_stats": True})
    chunks = [json.loads(event) for event in events(response)[:-1]]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]


def test_prompts_of_every_kind(server, tokenizer):
    text = "Hello world"
    ids = tokenizer.encode(text).ids
    expected = server.complete(prompt=text, seed=1).json()["choices"][0]["text"]
    assert server.complete(prompt=ids, seed=1).json()["choices"][0]["text"] == expected
    several = server.complete(prompt=[text, "other", text], seed=1).json()["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2]
    assert several[0]["text"] == several[2]["text"] == expected != several[1]["text"]
    assert server.complete(prompt=[ids, [9, 10]], seed=1).json()["choices"][0]["text"] == expected


def test_token_ids_reach_the_engine_as_they_are(server):
    server.complete(prompt=[7, 8, 9])
    assert server.engine.requests[-1].prompt_token_ids == [7, 8, 9]


def test_choices_are_numbered_prompt_by_prompt(server):
    before = len(server.engine.requests)
    answer = server.complete(prompt=["a", "b"], n=3, seed=10, max_tokens=4).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    asked = sorted(server.engine.requests[before:], key=lambda request: int(request.request_id.rsplit("-")[-1]))
    assert [request.sampling.seed for request in asked] == [10, 11, 12, 10, 11, 12]
    assert asked[0].prompt_token_ids == asked[2].prompt_token_ids != asked[3].prompt_token_ids
    # A prompt with several choices counts once.
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 24


def test_streamed_choices_equal_whole_choices(server):
    fields = {"prompt": ["a", "b"], "n": 2, "seed": 5, "max_tokens": 20}
    whole = [choice["text"] for choice in server.complete(**fields).json()["choices"]]
    texts, finished = [""] * 4, []
    for event in events(server.complete(**fields, stream=True))[:-1]:
        choice = json.loads(event)["choices"][0]
        texts[choice["index"]] += choice["text"]
        finished += [choice["index"]] if choice["finish_reason"] else []
    assert texts == whole
    assert sorted(finished) == [0, 1, 2, 3]


def test_same_seed_same_text_and_no_seed_differs(server):
    texts = [server.complete(seed=42, max_tokens=30).json()["choices"][0]["text"] for _ in range(2)]
    assert texts[0] == texts[1]
    free = {server.complete(max_tokens=30).json()["choices"][0]["text"] for _ in range(3)}
    assert len(free) == 3


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_extreme_seeds_stay_64_bit(server, seed):
    before = len(server.engine.requests)
    assert server.complete(seed=seed, n=2).status_code == 200
    assert all(-(2**63) <= request.sampling.seed < 2**63 for request in server.engine.requests[before:])


def test_sampling_fields_reach_the_engine(server):
    server.complete(temperature=0.5, top_p=0.25, top_k=7, max_completion_tokens=9)
    sampling = server.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.25, 7, 9)


def test_penalties_and_biases_reach_the_engine(server):
    fields = {"min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1.25}
    assert server.complete(**fields, logit_bias={"5": -100, "007": 2.5}).status_code == 200
    sampling = server.engine.requests[-1].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == {5: -100.0, 7: 2.5}


def test_sampling_defaults(server):
    server.complete(top_k=-1, temperature=None, top_p=None)
    sampling = server.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)


def test_temperature_below_what_floats_carry_is_greedy(server):
    server.complete(temperature=1e-300)
    assert server.engine.requests[-1].sampling.temperature == 0.0


def test_end_of_text_tokens_of_engine_and_tokenizer_stop(server):
    server.complete()
    # 1 is the engine's and the tokenizer's, 0 comes from generation_config.json.
    assert server.engine.requests[-1].sampling.stop_token_ids == (0, 1)


def test_end_of_text_ends_with_stop_and_ignore_eos_goes_on(start, tokenizer):
    server = start(FakeEngine(script=tokenizer.encode("one two").ids))
    answer = server.complete(max_tokens=8).json()
    assert answer["choices"][0]["text"] == "one two"
    assert answer["choices"][0]["finish_reason"] == "stop"
    answer = server.complete(max_tokens=8, ignore_eos=True).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_per_event", [1, 3, 50])
def test_stop_string_across_tokens(start, tokenizer, stream, tokens_per_event):
    ids = tokenizer.encode("one two three four five six").ids
    server = start(FakeEngine(script=ids, tokens_per_event=tokens_per_event))
    # The engine may be ahead of the stop string; the answer must not show it.
    answer = server.openai.completions.create(
        model="tiny", prompt="x", max_tokens=50, stop=["e fou", "never"], stream=stream
    )
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].text for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
        assert answer.usage.completion_tokens <= len(ids)
    assert text == "one two thre"
    assert reason == "stop"


def test_stop_string_aborts_the_sequence_in_the_engine(start, tokenizer):
    server = start(FakeEngine(script=tokenizer.encode("one two three four").ids * 10, token_seconds=0.01))
    server.complete(max_tokens=100, stop="two")
    assert server.engine.aborted == [server.engine.requests[0].request_id]
    assert not server.engine.running


def test_stop_string_of_one_choice_leaves_the_others(start, tokenizer):
    server = start(FakeEngine())
    free = server.complete(n=3, seed=1, max_tokens=40).json()["choices"]
    stop = free[1]["text"][10:14]
    assert len(stop) == 4
    expected = [choice["text"].split(stop)[0] for choice in free]
    stopped = server.complete(n=3, seed=1, max_tokens=40, stop=stop).json()["choices"]
    assert [choice["text"] for choice in stopped] == expected
    assert stopped[1]["finish_reason"] == "stop"


def test_stopped_choice_is_aborted_while_the_others_run(start):
    server = start(FakeEngine(token_seconds=0.01))
    free = server.complete(n=3, seed=1, max_tokens=60).json()["choices"]
    stop = free[1]["text"][4:9]
    assert not any(stop in choice["text"] for choice in (free[0], free[2]))
    stream = server.openai.completions.create(
        model="tiny", prompt="Hello world", n=3, seed=1, max_tokens=200, stop=stop, stream=True
    )
    for chunk in stream:
        if chunk.choices[0].finish_reason == "stop":
            break
    stopped = server.engine.requests[3 + chunk.choices[0].index].request_id
    wait_until(lambda: stopped not in server.engine.running, "the stopped choice runs on")
    assert len(server.engine.running) == 2
    stream.close()


def test_events_of_several_tokens_give_the_same_text(start):
    texts = set()
    for tokens_per_event in (1, 4):
        server = start(FakeEngine(tokens_per_event=tokens_per_event))
        texts.add(server.complete(seed=9, max_tokens=33).json()["choices"][0]["text"])
    assert len(texts) == 1


def test_neutral_values_of_unsupported_fields_are_accepted(server):
    response = server.complete(
        logprobs=None, echo=False, best_of=1, suffix=None, logit_bias={}, presence_penalty=0, frequency_penalty=0.0,
        repetition_penalty=1.0, min_p=0, user="me", store=False, service_tier="auto", metadata={"a": "b"}, n=1,
        parallel_tool_calls=True, safety_identifier="x", prompt_cache_key="y", response_format={"type": "text"},
        stream_options=None, stop=None, seed=None,
    )  # fmt: skip
    assert response.status_code == 200, response.text


def test_client_gets_its_request_id_back(server):
    response = server.http.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "my-id:1.2_3"})
    assert response.headers["x-request-id"] == "my-id:1.2_3"


@pytest.mark.parametrize("sent", ["has space", "x" * 129, "semi;colon", 'q"uote', ""])
def test_strange_request_ids_are_replaced(server, sent):
    response = server.http.get("/health", headers={"X-Request-Id": sent})
    assert response.headers["x-request-id"].startswith("req-")


def test_openai_client_sees_the_request_id(server):
    answer = server.openai.completions.create(model="tiny", prompt="a")
    assert answer._request_id.startswith("req-")
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.completions.create(model="tiny", prompt="")
    assert caught.value.request_id.startswith("req-")
