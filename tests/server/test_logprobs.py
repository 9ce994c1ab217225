"""Log probabilities in both shapes, echoed prompts, and the text of single tokens."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models

from anybit.server.token_text import TokenTexts
from tests.server.fake_engine import FakeEngine


def choice(server, **fields):
    response = server.complete(**fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def chunks(response):
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines]


@pytest.fixture
def talker(start, tokenizer):
    """A server whose answers are whole words, unlike the fake engine's usual ones."""
    return start(FakeEngine(script=tokenizer.encode("The quick brown fox jumps over the lazy dog").ids))


def test_completion_reports_every_token_with_its_place(talker):
    answer = choice(talker, max_tokens=8, logprobs=3)
    logprobs = answer["logprobs"]
    assert {len(logprobs[name]) for name in logprobs} == {8}
    assert "".join(logprobs["tokens"]) == answer["text"]
    places = zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
    assert all(answer["text"].startswith(token, offset) for token, offset in places)
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == value < max(top.values()) == -0.5
        assert len(top) == 3


def test_a_chosen_token_outside_the_likeliest_is_added_to_them(server):
    for num_top, expected in ((0, 1), (1, 2)):
        logprobs = choice(server, max_tokens=2, logprobs=num_top)["logprobs"]
        assert [len(top) for top in logprobs["top_logprobs"]] == [expected] * 2


def test_without_the_field_nothing_is_reported(server):
    for fields in ({}, {"logprobs": None}, {"logprobs": False}):
        assert choice(server, max_tokens=2, **fields)["logprobs"] is None
    assert server.chat(max_tokens=2, logprobs=False).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("tokens_per_event", [1, 4])
def test_stream_reports_what_the_whole_answer_does(start, tokens_per_event):
    server = start(FakeEngine(tokens_per_event=tokens_per_event))
    fields = {"max_tokens": 11, "logprobs": 2, "echo": True, "seed": 5}
    whole = choice(server, **fields)
    pieces = chunks(server.complete(**fields, stream=True))
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces for value in piece["logprobs"][name]] == values


def test_echo_puts_the_prompt_before_the_answer(server):
    fields = {"prompt": "Hello world", "max_tokens": 5, "seed": 3}
    plain = choice(server, **fields)["text"]
    assert choice(server, **fields, echo=True)["text"] == "Hello world" + plain
    pieces = chunks(server.complete(**fields, echo=True, stream=True))
    assert "".join(piece["text"] for piece in pieces) == "Hello world" + plain


def test_echo_of_token_ids_writes_special_tokens_out(server, tokenizer):
    ids = [2, *tokenizer.encode("user hello").ids, 1]
    assert choice(server, prompt=ids, max_tokens=0, echo=True)["text"] == "<|im_start|>user hello<|im_end|>"


def test_echoed_prompt_is_scored_from_its_second_token(server, tokenizer):
    prompts = [[2, *tokenizer.encode("One two three four five").ids], tokenizer.encode("Hello").ids]
    response = server.complete(prompt=prompts, max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1234)
    choices = response.json()["choices"]
    assert [one["index"] for one in choices] == [0, 1]
    for ids, one in zip(prompts, choices, strict=True):
        logprobs = one["logprobs"]
        assert logprobs["token_logprobs"][: len(ids)] == [None, *(-1.0 - token for token in ids[1:])]
        assert len(logprobs["token_logprobs"]) == len(ids) + 1
        assert logprobs["top_logprobs"][0] is None
        assert [one["text"][offset:].startswith(token) for token, offset in zip(
            logprobs["tokens"], logprobs["text_offset"], strict=True
        )] == [True] * (len(ids) + 1)  # fmt: skip
    assert response.json()["usage"]["completion_tokens"] == 2


def test_zero_tokens_score_the_prompt_only(server):
    answer = choice(server, prompt="Hello world, hello there", max_tokens=0, echo=True, logprobs=0)
    assert answer["text"] == "Hello world, hello there"
    assert answer["finish_reason"] == "length"
    assert "".join(answer["logprobs"]["tokens"]) == answer["text"]


def test_prompt_that_fills_the_context_can_be_scored(server):
    assert choice(server, prompt=[5] * 256, max_tokens=0, echo=True, logprobs=0)["finish_reason"] == "length"
    assert server.complete(prompt=[5] * 256, max_tokens=1, echo=True).status_code == 400


def test_every_choice_echoes_its_own_prompt(server):
    response = server.complete(prompt=["Hello", "One two"], n=2, max_tokens=1, echo=True, logprobs=0)
    texts = [one["text"] for one in response.json()["choices"]]
    assert [text.startswith(prompt) for text, prompt in zip(texts, ["Hello", "Hello", "One", "One"], strict=True)] == [
        True
    ] * 4
    assert all(one["logprobs"]["token_logprobs"][0] is None for one in response.json()["choices"])


def test_tokens_of_a_stop_string_are_reported_up_to_the_one_that_completed_it(start, tokenizer):
    script = tokenizer.encode("One two three four").ids
    server = start(FakeEngine(script=script, tokens_per_event=3))
    answer = choice(server, max_tokens=50, stop=" three", logprobs=0)
    assert answer["text"] == "One two"
    assert "".join(answer["logprobs"]["tokens"]) == "One two three"


def test_a_character_of_several_tokens_is_reported_in_bytes(start, tokenizer):
    script = tokenizer.encode("a\u20acb").ids
    server = start(FakeEngine(script=script))
    logprobs = choice(server, max_tokens=len(script), logprobs=0)["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert logprobs["text_offset"] == [0, 1, 2, 2, 2]
    content = server.chat(max_tokens=len(script), logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "a\u20acb"


def test_special_tokens_take_no_place_in_the_text(start, tokenizer):
    hello, there = tokenizer.encode("hello").ids, tokenizer.encode(" there").ids
    server = start(FakeEngine(script=[*hello, 2, *there]))
    answer = choice(server, max_tokens=len(hello) + 1 + len(there), logprobs=0)
    assert answer["text"] == "hello there"
    assert answer["logprobs"]["tokens"][len(hello)] == "<|im_start|>"
    assert answer["logprobs"]["text_offset"][len(hello) : len(hello) + 2] == [5, 5]


def test_chat_reports_objects(talker):
    answer = talker.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, logprobs=True, top_logprobs=2
    ).choices[0]
    assert len(answer.logprobs.content) == 4
    assert "".join(entry.token for entry in answer.logprobs.content) == answer.message.content
    for entry in answer.logprobs.content:
        assert [len(entry.top_logprobs), entry.top_logprobs[0].logprob] == [2, -0.5]
        assert bytes(entry.bytes).decode() == entry.token
    without_top = talker.chat(max_tokens=1, logprobs=True).json()["choices"][0]["logprobs"]
    assert without_top["content"][0]["top_logprobs"] == []


def test_chat_stream_reports_them_token_by_token(server):
    pieces = chunks(server.chat(max_tokens=3, logprobs=True, top_logprobs=1, stream=True))
    assert [len(piece["logprobs"]["content"]) for piece in pieces] == [1, 1, 1]


def test_top_logprobs_without_logprobs_is_a_mistake(server):
    response = server.chat(top_logprobs=2)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "top_logprobs"


def test_usage_tells_the_cached_tokens_of_every_prompt_once(start):
    server = start(FakeEngine(num_cached_tokens=1))
    usage = server.complete(prompt=["Hello", "One"], n=3, max_tokens=2).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


def test_salt_reaches_the_engine(start):
    server = start()
    server.complete(max_tokens=1, cache_salt="mine")
    server.complete(max_tokens=1)
    assert [request.cache_salt for request in server.engine.requests] == ["mine", ""]


def test_texts_of_a_tokenizer_with_byte_fallback():
    vocabulary = {"<unk>": 0, "<0xE2>": 1, "\u2581the": 2, "x": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<eos>"])
    texts = TokenTexts(tokenizer)
    assert [texts.text_of(token_id) for token_id in (1, 2, 3, 4)] == ["bytes:\\xe2", " the", "x", "<eos>"]
    assert (texts.bytes_of(99), texts.num_characters(99)) == (b"", 0)


def test_texts_of_a_byte_level_tokenizer_cover_every_byte(tokenizer):
    texts = TokenTexts(tokenizer)
    single = {texts.bytes_of(token_id) for token_id in range(tokenizer.get_vocab_size())}
    assert {bytes([byte]) for byte in range(256)} <= single
