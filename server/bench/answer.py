"""What the bytes of a streamed answer, and the times at which they came, say about it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class Answer:
    """One complete answer; times are in seconds."""

    first_token: float  # since the request was sent
    last_token: float
    gaps: list[float]  # between two tokens
    prompt_tokens: int | None  # None when the server does not tell
    generated_tokens: int
    bit_width: int | None

    @property
    def seconds_per_token(self) -> float | None:
        """Of the tokens after the first; None when fewer than two moments were seen."""
        if not self.gaps:
            return None
        return (self.last_token - self.first_token) / (self.generated_tokens - 1)


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without a complete answer: `kind` is 429, another class of status such as 5xx, timeout, connection, or
    answer for a stream that broke off or says something else than was asked."""

    kind: str
    message: str


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def is_bare(self) -> bool:
        """Whether this may only open or close the answer, without a token."""
        delta = self.delta or _Delta()
        has_text = self.text or delta.content or delta.reasoning or delta.reasoning_content
        return not has_text and (delta.role is not None or self.finish_reason is not None)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    bit_width: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


def read_answer(sent: float, reads: Iterable[tuple[float, bytes]], bit_width: int | None) -> Answer | Failure:
    """The answer in the body of a stream, of which each piece came with the time of its arrival.

    A chunk is one token unless the usage says otherwise; then the tokens are spread evenly over the chunks.
    """
    moments: list[tuple[float, bool]] = []
    usage: _Usage | None = None
    ended = False
    for time, data in events(reads):
        if data == b"[DONE]":
            ended = True
            continue
        try:
            chunk = _decode_chunk(data)
        except msgspec.DecodeError as error:
            return Failure("answer", f"A chunk of the stream is not as expected: {error}.")
        if chunk.error is not None:
            return Failure("answer", error_message(chunk.error))
        usage = chunk.usage or usage
        for choice in chunk.choices:
            moments.append((time - sent, choice.is_bare))
            ended = ended or choice.finish_reason is not None
    if not ended:
        return Failure("answer", "The stream ended before the answer did.")
    if bit_width is not None and usage is not None and usage.bit_width not in (None, bit_width):
        return Failure("answer", f"The answer was computed at {usage.bit_width} bits instead of {bit_width}.")
    return _measure(moments, usage)


def _measure(moments: Sequence[tuple[float, bool]], usage: _Usage | None) -> Answer | Failure:
    times = [time for time, _ in moments]
    # A first or last chunk without text can be a token without text, or no token: the usage knows.
    if usage is None or len(times) != usage.completion_tokens:
        times = [time for time, is_bare in moments if not is_bare]
    if not times:
        return Failure("answer", "The answer had no token.")
    generated = usage.completion_tokens if usage is not None and usage.completion_tokens else len(times)
    tokens_per_chunk = max(1.0, generated / len(times))
    return Answer(
        first_token=times[0],
        last_token=times[-1],
        gaps=[(after - before) / tokens_per_chunk for before, after in pairwise(times)] if generated > 1 else [],
        prompt_tokens=None if usage is None else usage.prompt_tokens,
        generated_tokens=generated,
        bit_width=None if usage is None else usage.bit_width,
    )


def events(reads: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event and the time at which it was complete, however the bytes were cut."""
    rest = b""
    time = 0.0
    for time, piece in reads:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield time, line[5:].strip()
    if rest.startswith(b"data:"):  # the last line may lack its end
        yield time, rest[5:].strip()


def error_message(error: Any) -> str:
    """The sentence in a server's error, whichever of the usual shapes it has."""
    while isinstance(error, dict):
        error = next((error[key] for key in ("error", "message", "detail") if error.get(key)), str(error))
    return shorten(str(error))


def shorten(text: str) -> str:
    """`text` on one line of moderate length."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]}…"
