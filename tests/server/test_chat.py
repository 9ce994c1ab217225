"""POST /v1/chat/completions: messages, template, chunks."""

import json

import openai
import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.tiny_checkpoint import write_checkpoint


def prompt_text(server, tokenizer) -> str:
    return tokenizer.decode(server.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


def test_answer_has_the_documented_shape(server):
    answer = server.chat(max_tokens=5).json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["usage"]["bit_width"] == 4


def test_official_client_reads_answer_and_stream(server):
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "seed": 1}
    whole = server.openai.chat.completions.create(**fields)
    chunks = list(server.openai.chat.completions.create(**fields, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 19 + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_every_streamed_choice_begins_with_its_role(server):
    response = server.chat(n=3, max_tokens=4, stream=True)
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    roles = [chunk["choices"][0]["index"] for chunk in chunks if "role" in chunk["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1, 2]


def test_stream_usage_comes_last(server):
    chunks = list(
        server.openai.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_default_limit_is_the_rest_of_the_context(server):
    usage = server.chat().json()["usage"]
    assert usage["total_tokens"] == 256


def test_template_makes_the_prompt(server, tokenizer):
    server.chat(
        max_tokens=1,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": "three", "name": "me"},
        ],
    )
    assert prompt_text(server, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_of_the_template_are_single_ids(server):
    server.chat(max_tokens=1)
    assert server.engine.requests[-1].prompt_token_ids[0] == 2


def test_long_conversations_are_rendered_too(start, tokenizer):
    from tests.server.fake_engine import model_info

    server = start(FakeEngine(info=model_info(max_model_len=20_000)))
    content = "Hello world. " * 1000
    response = server.chat(messages=[{"role": "user", "content": content}], max_tokens=1)
    assert response.status_code == 200
    assert content in prompt_text(server, tokenizer)


def test_refusal_of_the_template_is_a_400_with_its_words(server):
    response = server.chat(messages=[{"role": "user", "content": "please refuse"}])
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"] == (
        "The chat template of this model refused these messages: Conversation roles must alternate."
    )
    assert error["param"] == "messages"


def test_model_without_template_says_so(start, tokenizer, tmp_path):
    server = start(checkpoint=write_checkpoint(tmp_path, tokenizer, chat_template=None))
    with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
        server.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}])
    assert server.complete().status_code == 200


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "at least 1 item"),
        ("hello", "valid list"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "role 'tool' are not supported"),
        ([{"role": "robot", "content": "x"}], "'system', 'developer', 'user' or 'assistant'"),
        ([{"role": "user"}], "needs a content"),
        ([{"role": "user", "content": None}], "needs a content"),
        ([{"role": "user", "content": []}], "string or a list of text parts"),
        ([{"role": "user", "content": 5}], "string or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], "'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "A content part must look like"),
        ([{"role": "user", "content": ["x"]}], "A content part must look like"),
        ([{"role": "user", "content": "x", "color": "red"}], "Unknown field 'messages.0.color'"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], "'tool_calls' is not supported"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
        (["hello"], "valid dictionary"),
        ([{"content": "x"}], "'messages.0.role' is required"),
    ],
)
def test_wrong_messages_are_refused_in_one_sentence(server, messages, sentence):
    body = json.dumps({"model": "tiny", "messages": messages})
    response = server.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert sentence in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "auto"},
        {"functions": [{}]},
        {"function_call": "auto"},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["audio"]},
        {"audio": {"voice": "x"}},
        {"prediction": {"type": "content"}},
        {"chat_template": "{{ 1 }}"},
        {"chat_template_kwargs": {"tokenize": True}},
        {"store": True},
        {"reasoning_effort": "high"},
    ],
)
def test_fields_that_cannot_be_honoured_are_refused_by_name(server, fields):
    response = server.chat(**fields)
    assert response.status_code == 400
    name = next(iter(fields))
    assert f"'{name}' is not supported" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == name


def test_neutral_values_are_accepted(server):
    response = server.chat(
        tools=[], tool_choice="none", functions=None, function_call="none", response_format={"type": "text"},
        logprobs=False, top_logprobs=0, modalities=["text"], audio=None, prediction=None, max_tokens=1,
    )  # fmt: skip
    assert response.status_code == 200, response.text
