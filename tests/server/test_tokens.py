"""POST /tokenize and /detokenize."""

import json

import pytest

JSON = {"Content-Type": "application/json"}


def tokenize(server, **fields):
    return server.http.post("/tokenize", json=fields)


def detokenize(server, **fields):
    return server.http.post("/detokenize", json=fields)


def test_text_becomes_the_ids_of_a_completion_prompt_and_comes_back(server, tokenizer):
    text = "Hello world \u20ac <|im_end|>"
    answer = tokenize(server, model="tiny", prompt=text).json()
    assert answer == {"tokens": tokenizer.encode(text).ids, "count": len(answer["tokens"]), "max_model_len": 256}
    assert detokenize(server, tokens=answer["tokens"]).json() == {"prompt": text}


def test_conversation_is_rendered_as_for_a_chat(server, tokenizer):
    answer = tokenize(server, model="tiny@2bit", messages=[{"role": "user", "content": "Hello"}]).json()
    expected = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert answer["tokens"] == tokenizer.encode(expected).ids
    usage = server.chat(messages=[{"role": "user", "content": "Hello"}], max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] == answer["count"]


def test_text_longer_than_the_context_is_tokenized(server):
    answer = tokenize(server, prompt="hello " * 5000).json()
    assert answer["count"] > answer["max_model_len"]


def test_nothing_has_no_tokens(server):
    assert tokenize(server, prompt="").json()["tokens"] == []
    assert detokenize(server, tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("fields", "status", "part", "param"),
    [
        ({}, 400, "Send either prompt or messages.", "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "Send either", "prompt"),
        ({"prompt": "\ud83d"}, 400, "half of a surrogate pair", None),
        ({"prompt": ["a"]}, 400, "valid string", "prompt"),
        ({"messages": []}, 400, "at least 1", "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "add_special_tokens": False}, 400, "for a prompt", None),
        ({"prompt": "a", "model": "other"}, 404, "not served here", "model"),
        ({"prompt": "a", "model": "tiny@5bit"}, 400, "on offer are", "model"),
        ({"prompt": "a", "unheard_of": 1}, 400, "Unknown field", "unheard_of"),
    ],
)
def test_wrong_tokenize_request_gets_a_sentence(server, fields, status, part, param):
    check(server.http.post("/tokenize", content=json.dumps(fields), headers=JSON), status, part, param)


@pytest.mark.parametrize(
    ("fields", "status", "part", "param"),
    [
        ({}, 400, "required", "tokens"),
        ({"tokens": [512]}, 400, "the id 512, but the model knows ids below 512", "tokens"),
        ({"tokens": [-1]}, 400, "greater than or equal to 0", "tokens.0"),
        ({"tokens": ["a"]}, 400, "valid integer", "tokens.0"),
        ({"tokens": "a"}, 400, "valid list", "tokens"),
        ({"tokens": [1], "model": "other"}, 404, "not served here", "model"),
    ],
)
def test_wrong_detokenize_request_gets_a_sentence(server, fields, status, part, param):
    check(server.http.post("/detokenize", content=json.dumps(fields), headers=JSON), status, part, param)


def check(response, status, part, param):
    error = response.json()["error"]
    assert response.status_code == status, response.text
    assert part in error["message"]
    if param is not None:
        assert error["param"] == param
