"""Asks a server for tokens of texts and for log probabilities of known tokens."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import msgspec

from anybit.server.bench.client import body_message, describe
from anybit.server.bench.target import TargetError

_TIMEOUT_SECONDS = 600.0
_LONGEST_PAUSE_SECONDS = 10.0

Answer = TypeVar("Answer")


class _Tokens(msgspec.Struct):
    tokens: list[int]
    max_model_len: int


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None]


class _Choice(msgspec.Struct):
    index: int
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct):
    bit_width: int | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class ScoringClient:
    """One model of one server. Every method raises TargetError with a sentence when the server does not do its part."""

    http: httpx.AsyncClient
    base_url: str
    model: str

    async def tokenize(self, text: str, special: bool = False) -> tuple[list[int], int]:
        """Token ids of a text, with what a prompt gets before and after it if `special`; and the longest context."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": special}
        answer = await self._post(f"{self.base_url.removesuffix('/v1')}/tokenize", body, _Tokens)
        return answer.tokens, answer.max_model_len

    async def score(self, sequences: Sequence[Sequence[int]], bit_width: int | None) -> list[list[float]]:
        """Per sequence of token ids the log probability of each token after the first, at a width or the server's own."""
        body: dict[str, Any] = {"model": self.model, "prompt": sequences, "max_tokens": 0, "echo": True, "logprobs": 0}
        if bit_width is not None:
            body["bit_width"] = bit_width
        answer = await self._post(f"{self.base_url}/completions", body, _Completion)
        used = None if answer.usage is None else answer.usage.bit_width
        if bit_width is not None and used not in (None, bit_width):
            raise TargetError(f"The server answered at {used} bits instead of {bit_width}.")
        scores = [_scores(choice) for choice in sorted(answer.choices, key=lambda choice: choice.index)]
        if [len(values) for values in scores] != [len(sequence) - 1 for sequence in sequences]:
            raise TargetError(
                f"{self.base_url} does not score the tokens of a prompt (echo and logprobs with max_tokens 0), "
                "so nothing can be evaluated through it."
            )
        return scores

    async def _post(self, url: str, body: dict[str, Any], kind: type[Answer]) -> Answer:
        content = msgspec.json.encode(body)
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            try:
                response = await self.http.post(url, content=content, timeout=_TIMEOUT_SECONDS)
            except httpx.HTTPError as error:
                raise TargetError(f"{url} cannot be reached: {describe(error).rstrip('.')}.") from error
            if response.status_code != 429 or time.monotonic() > deadline:
                break
            await asyncio.sleep(_pause_seconds(response))
        if response.status_code != 200:
            raise TargetError(f"{url} answered {response.status_code}: {body_message(response.text).rstrip('.')}.")
        try:
            return msgspec.json.decode(response.content, type=kind)
        except msgspec.DecodeError as error:
            raise TargetError(f"{url} answered in another shape than this project's servers: {error}.") from error


def _scores(choice: _Choice) -> list[float]:
    """Of the tokens that have one: nothing predicts the first."""
    values = [] if choice.logprobs is None else choice.logprobs.token_logprobs
    return [value for value in values if value is not None]


def _pause_seconds(response: httpx.Response) -> float:
    """How long the server wants to be left alone."""
    try:
        wanted = float(response.headers.get("Retry-After", "1"))
    except ValueError:
        wanted = 1.0
    return min(max(wanted, 0.1), _LONGEST_PAUSE_SECONDS)
