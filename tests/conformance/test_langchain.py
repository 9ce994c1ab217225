"""LangChain's clients: whole answers, streams, batches, token usage, log probabilities."""

from typing import Any

import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI


@pytest.fixture(scope="module")
def chat(server: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model=server.model, temperature=0, max_tokens=12)


def test_chat_answers_and_tells_its_usage(chat: ChatOpenAI) -> None:
    message = chat.invoke([SystemMessage("Answer in one word."), HumanMessage("What is the capital of France?")])
    assert "Paris" in message.content
    assert message.usage_metadata["output_tokens"] > 0


def test_chat_stream_is_the_whole_answer(chat: ChatOpenAI) -> None:
    whole = chat.invoke("What is the capital of Italy?").content
    assert "".join(chunk.content for chunk in chat.stream("What is the capital of Italy?")) == whole


def test_chat_batch_gives_the_answers_one_by_one(chat: ChatOpenAI) -> None:
    questions = ["Name a color.", "Name an animal.", "Name a city."]
    batch = [message.content for message in chat.batch(questions)]
    assert batch == [chat.invoke(question).content for question in questions]


def test_chat_log_probabilities(chat: ChatOpenAI) -> None:
    message = chat.bind(logprobs=True, top_logprobs=2).invoke("Say hello.")
    content = message.response_metadata["logprobs"]["content"]
    assert len(content) == message.usage_metadata["output_tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_width_as_alias_and_in_the_body(server: Any) -> None:
    settings = {"base_url": f"{server.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 8}
    alias = ChatOpenAI(model=f"{server.model}@8bit", **settings).invoke("Why is the sky blue?")
    body = ChatOpenAI(model=server.model, extra_body={"bit_width": 8}, **settings).invoke("Why is the sky blue?")
    assert alias.content == body.content


def test_completions_with_several_choices(server: Any) -> None:
    llm = OpenAI(base_url=f"{server.url}/v1", api_key="none", model=server.model, max_tokens=5, n=2, best_of=2)
    answer = llm.generate(["The capital of France is"])
    assert len(answer.generations[0]) == 2
