"""Reading a stream: however its bytes were cut, whatever shape its chunks have, tokens get the times they came at."""

import json
from typing import Any

import pytest

from anybit.server.bench.answer import Answer, Failure, error_message, events, read_answer

STREAM = (
    b': hello\n\ndata: {"a": "gr\xc3\xbc\xc3\x9fe"}\r\n\r\nevent: x\ndata:{"b": 2}\n\n'
    b'id: 7\ndata: {"c": "data: no"}\n\ndata: [DONE]\n\n'
)
DATA = [b'{"a": "gr\xc3\xbc\xc3\x9fe"}', b'{"b": 2}', b'{"c": "data: no"}', b"[DONE]"]


def text(content: str, finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": content, "finish_reason": finish_reason}], **fields}


def delta(finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


def usage(completion_tokens: int, prompt_tokens: int = 5, **fields: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, **fields}}


def read(*chunks: dict[str, Any], done: bool = True, width: int | None = None) -> Answer | Failure:
    """The answer whose chunks come at 101, 102, 103 s to a request sent at 100 s."""
    pieces = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    reads = [(101.0 + index, piece) for index, piece in enumerate(pieces)]
    return read_answer(100.0, [*reads, (999.0, b"data: [DONE]\n\n")] if done else reads, width)


def answered(*chunks: dict[str, Any], width: int | None = None) -> Answer:
    answer = read(*chunks, width=width)
    assert isinstance(answer, Answer), answer
    return answer


def test_events_are_the_same_wherever_the_stream_is_cut() -> None:
    for first in range(len(STREAM)):
        for second in range(first, len(STREAM)):
            pieces = [STREAM[:first], STREAM[first:second], STREAM[second:]]
            assert [data for _, data in events((0.0, piece) for piece in pieces)] == DATA


def test_event_has_the_time_of_its_last_byte() -> None:
    end = STREAM.index(b"\r\n\r\nevent")
    reads = [(1.0, STREAM[: end - 5]), (2.0, STREAM[end - 5 : end + 2]), (3.0, STREAM[end + 2 :])]
    assert [time for time, _ in events(reads)] == [2.0, 3.0, 3.0, 3.0]


def test_last_line_may_lack_its_end() -> None:
    assert list(events([(1.0, b"data: 1\n\ndata: [DO"), (2.0, b"NE]")])) == [(1.0, b"1"), (2.0, b"[DONE]")]


def test_one_chunk_is_one_token() -> None:
    answer = answered(text("a"), text("b"), text("c", "length"), usage(3, 7, bit_width=4), width=4)
    assert answer == Answer(1.0, 3.0, [1.0, 1.0], prompt_tokens=7, generated_tokens=3, bit_width=4)
    assert answer.seconds_per_token == 1.0


def test_tokens_without_text_of_their_own_count() -> None:
    answer = answered(delta(role="assistant", content=""), delta(content="ü"), delta("length", content=""), usage(3))
    assert (answer.first_token, answer.last_token, answer.generated_tokens) == (1.0, 3.0, 3)


def test_chunks_that_only_open_and_close_an_answer_are_no_tokens() -> None:
    answer = answered(
        delta(role="assistant", content=None), delta(content="a"), delta(reasoning_content="b"), delta("stop"), usage(2)
    )
    assert answer == Answer(2.0, 3.0, [1.0], 5, 2, None)


def test_several_tokens_in_a_chunk_are_spread_evenly() -> None:
    answer = answered(text("a b"), text("c d"), text("e f"), text("", "stop"), usage(6))
    assert answer.gaps == [0.5, 0.5]
    assert answer.seconds_per_token == 2 / 5


def test_without_usage_chunks_are_counted() -> None:
    assert answered(text("a"), text("b"), text("", "stop")) == Answer(1.0, 2.0, [1.0], None, 2, None)


def test_usage_may_come_with_every_chunk() -> None:
    chunks = [text(letter, usage={"prompt_tokens": 5, "completion_tokens": n}) for n, letter in enumerate("abc", 1)]
    assert answered(*chunks).generated_tokens == 3


def test_one_token_has_no_gap_and_no_time_per_further_token() -> None:
    answer = answered(text("a", "length"), usage(1))
    assert answer.gaps == []
    assert answer.seconds_per_token is None
    assert answered(text("abc", "length"), usage(3)).seconds_per_token is None  # all in one moment


def test_reason_is_enough_of_an_end() -> None:
    assert isinstance(read(text("a", "stop"), done=False), Answer)


@pytest.mark.parametrize(
    ("failure", "telling"),
    [
        (read(text("a"), done=False), "ended before"),
        (read(done=False), "ended before"),
        (read(text("a"), {"error": {"message": "engine lost"}}), "engine lost"),
        (read(text("", "stop"), usage(0)), "no token"),
        (read({"choices": "none"}), "not as expected"),
        (read(text("a", "stop"), usage(1, bit_width=4), width=8), "4 bits instead of 8"),
    ],
)
def test_broken_answer_is_a_failure(failure: Answer | Failure, telling: str) -> None:
    assert isinstance(failure, Failure)
    assert failure.kind == "answer"
    assert telling in failure.message


@pytest.mark.parametrize(
    "error",
    [
        "it\nbroke",
        {"message": "it broke"},
        {"error": {"message": "it broke", "type": "x"}},
        {"error": "it broke"},
        {"detail": "it broke"},
    ],
)
def test_error_message_is_found_in_every_usual_shape(error: Any) -> None:
    assert error_message(error) == "it broke"


def test_error_message_without_one_is_the_error() -> None:
    assert error_message({"code": 3}) == "{'code': 3}"
    assert len(error_message("x" * 5000)) < 400
