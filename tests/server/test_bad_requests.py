"""Every wrong request gets its status, OpenAI's error shape and one sentence; the server goes on."""

import json

import openai
import pytest

JSON = {"Content-Type": "application/json"}


def assert_error(response, status: int, sentence: str, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert sentence in error["message"]
    assert error["message"].endswith(".")
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    assert error["param"] == param
    assert response.headers["x-request-id"]


def post(server, body: bytes, headers=JSON):
    return server.http.post("/v1/completions", content=body, headers=headers)


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"n": 10_000}, "n", "less than or equal to 16"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": True}, "n", "valid integer"),
        ({"n": 1.0}, "n", "valid integer"),
        ({"n": 16, "prompt": ["a"] * 5}, "n", "5 prompts times n=16 are 80 answers"),
        ({"prompt": ["a"] * 65}, "prompt", "65 prompts"),
        ({"best_of": 2}, "best_of", "best_of above n"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": 999999}, "temperature", "less than or equal to 2"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": -1}, "top_p", "greater than 0"),
        ({"top_p": 1.01}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"top_k": 10**12}, "top_k", "less than or equal to"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**18}, "max_tokens", "less than or equal to"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "two names of one limit"),
        ({"seed": 2**63}, "seed", "less than or equal to"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"stop": ""}, "stop", "must not be empty"),
        ({"stop": ["a", ""]}, "stop", "must not be empty"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": 5}, "stop", "string or a list of strings"),
        ({"stop": ["x" * 1025]}, "stop", "at most 1024 characters"),
        ({"stream": 1}, "stream", "valid boolean"),
        ({"stream": "true"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only together with stream=true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unknown field 'stream_options.x'"),
        ({"prompt": ""}, "prompt", "The prompt is empty"),
        ({"prompt": []}, "prompt", "The prompt is empty"),
        ({"prompt": [[]]}, "prompt", "The prompt is empty"),
        ({"prompt": ["a", ""]}, "prompt", "The prompt is empty"),
        ({"prompt": None}, "prompt", "The prompt must be a string"),
        ({"prompt": 5}, "prompt", "The prompt must be a string"),
        ({"prompt": {"a": 1}}, "prompt", "The prompt must be a string"),
        ({"prompt": ["a", 5]}, "prompt", "mixes kinds"),
        ({"prompt": [True, False]}, "prompt", "mixes kinds"),
        ({"prompt": [1.5]}, "prompt", "mixes kinds"),
        ({"prompt": [[1], "a"]}, "prompt", "mixes kinds"),
        ({"prompt": [[1, True]]}, "prompt", "integers only"),
        ({"prompt": [-1]}, "prompt", "between 0 and"),
        ({"prompt": [2**31]}, "prompt", "between 0 and"),
        ({"prompt": [512]}, "prompt", "token id 512, but the model knows ids below 512"),
        ({"prompt": "\ud83d"}, "prompt", "half of a surrogate pair"),
        ({"echo": 1}, "echo", "valid boolean"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": -1}, "logprobs", "greater than or equal to 0"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "only together with echo=true"),
        ({"cache_salt": "x" * 257}, "cache_salt", "at most 256"),
        ({"suffix": "x"}, "suffix", "'suffix' is not supported"),
        ({"logit_bias": []}, "logit_bias", "must be an object"),
        ({"logit_bias": {"one": 5}}, "logit_bias", "must be token ids"),
        ({"logit_bias": {"-1": 5}}, "logit_bias", "must be token ids"),
        ({"logit_bias": {"9" * 5000: 5}}, "logit_bias", "must be token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {"1": True}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {"512": 1}}, "logit_bias", "token id 512, but the model knows ids below 512"),
        ({"logit_bias": {str(key): 1 for key in range(1025)}}, "logit_bias", "at most 1024"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": False}, "frequency_penalty", "number"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "'response_format' is not supported"),
        ({"unheard_of": 1}, "unheard_of", "Unknown field 'unheard_of'."),
        ({"tools": []}, "tools", "Unknown field 'tools'."),
        ({"x" * 10_000: 1}, "x" * 100 + "…", "Unknown field"),
        ({"a{b}%s\u1234": 1}, "a{b}%s\u1234", "Unknown field 'a{b}%s\u1234'."),
        ({"a\ud800": 1}, None, "Invalid body: "),
        ({"unheard_of": {"a\ud800": "\udfff"}}, "unheard_of", "Unknown field"),
        ({"user": "\ud800"}, "user", "valid string"),
        ({"user": 5}, "user", "valid string"),
        ({"model": 5}, "model", "valid string"),
    ],
)
def test_wrong_field_is_a_400_that_names_it(server, fields, param, sentence):
    response = post(server, json.dumps({"prompt": "Hello", **fields}).encode())
    assert_error(response, 400, sentence, param)


def test_missing_prompt(server):
    assert_error(post(server, b"{}"), 400, "The field 'prompt' is required.", "prompt")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_numbers_that_are_not_finite(server, field, literal):
    body = f'{{"prompt": "Hello", "{field}": {literal}}}'.encode()
    assert_error(post(server, body), 400, "finite number", field)


def test_prompt_longer_than_the_context_names_both_numbers(server):
    assert_error(post(server, json.dumps({"prompt": [5] * 300}).encode()), 400, "The prompt has 300 tokens", "prompt")
    response = server.complete(prompt=[5] * 250, max_tokens=7)
    assert_error(response, 400, "ask for at most 6", "max_tokens")
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_prompt_that_fills_the_context_leaves_no_room(server):
    assert_error(server.complete(prompt=[5] * 256), 400, "at least one must stay free", "prompt")
    assert server.complete(prompt=[5] * 255).status_code == 200


def test_hopeless_text_is_refused_before_it_is_tokenized(server, monkeypatch):
    tokenizer = server.service._model.tokenizer

    def fail(*args):
        raise AssertionError("tokenized")

    monkeypatch.setattr(tokenizer, "_encode", fail)
    response = server.complete(prompt="x" * 1_000_000)
    assert_error(response, 400, "the context holds 256", "prompt")
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_text_with_too_many_tokens(server):
    assert_error(server.complete(prompt="a b c d " * 100), 400, "the context holds 256", "prompt")
    assert_error(server.chat(messages=[{"role": "user", "content": "a b c " * 100}]), 400, "the context", "messages")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON at line 1, column 2"),
        (b'{"prompt": "a",}', "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "not valid UTF-8 at byte 12"),
        (b"\xff\xfe{\x00}\x00", "not valid UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", "number that is too long"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
def test_body_that_is_no_json_object(server, body, sentence):
    assert_error(post(server, body), 400, sentence)


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx", "application/json; charset=latin-1"],
)
def test_other_content_types(server, content_type):
    assert_error(post(server, b'{"prompt": "a"}', {"Content-Type": content_type}), 400, "application/json")


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=UTF-8"])
def test_json_content_types(server, content_type):
    assert post(server, b'{"prompt": "a"}', {"Content-Type": content_type}).status_code == 200


def test_odd_but_valid_text_is_served(server):
    for prompt in ("\x00", "\u202e\u0000\ufffd", "🏴\u200d☠️", "\r\n\t", "<|im_end|>"):
        assert server.complete(prompt=prompt).status_code == 200


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/completions/", "//v1/completions", "/docs", "/v1/tokenize"])
def test_unknown_route_is_404_in_the_same_shape(server, path):
    assert_error(server.http.get(path), 404, "There is no route")


def test_wrong_method_is_405_in_the_same_shape(server):
    response = server.http.get("/v1/completions")
    assert_error(response, 405, "does not answer GET")
    assert response.headers["allow"] == "POST"
    assert_error(server.http.delete("/health"), 405, "does not answer DELETE")


def test_official_client_maps_the_errors(server):
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        server.openai.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.completions.create(model="tiny", prompt="a", n=10_000)
    assert caught.value.param == "n"


def test_nothing_wrong_reaches_the_engine(server):
    before = len(server.engine.requests)
    server.complete(n=10_000)
    server.complete(prompt=["ok", ""])
    server.complete(bit_width=7)
    assert len(server.engine.requests) == before
    assert server.service.admission.num_waiting == 0
