"""One streamed request to an OpenAI-compatible server, and the times of its chunks."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import msgspec

from anybit.server.bench.answer import Answer, Failure, error_message, read_answer, shorten

Endpoint = Literal["completions", "chat"]

_PATHS: dict[Endpoint, str] = {"completions": "/completions", "chat": "/chat/completions"}

# Fields that a measurement can do without; the width is not among them, or a row would be of another one than it says.
_OPTIONAL_FIELDS = ("ignore_eos", "stream_options")

# Shorter than what servers keep idle connections for, so that none is used in the moment in which it is closed.
_KEEPALIVE_SECONDS = 3.0


@contextlib.asynccontextmanager
async def http_client(base_url: str, api_key: str | None) -> AsyncIterator[httpx.AsyncClient]:
    """Connections without a bound on their number: whoever waits for one would be measured as the server's delay."""
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEPALIVE_SECONDS)
    verify = base_url.startswith("https:")  # loading certificates takes longer than many an answer
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=None, verify=verify) as http:
        yield http


@dataclass
class BenchClient:
    """Asks one server and model; remembers which optional fields the server refused."""

    http: httpx.AsyncClient
    base_url: str
    model: str
    endpoint: Endpoint
    max_tokens: int
    timeout_seconds: float
    refused_fields: list[str] = field(default_factory=list)

    async def ask(self, prompt: str, bit_width: int | None) -> Answer | Failure:
        """Send one request and read its answer to the end; never raises for what a server does."""
        body = self._body(prompt, bit_width)
        while True:
            for name in self.refused_fields:
                body.pop(name, None)
            outcome = await self._attempt(msgspec.json.encode(body), bit_width)
            if not isinstance(outcome, _Refusal):
                return outcome
            refused = outcome.names(body)
            if refused is None:
                return outcome.failure
            if refused not in self.refused_fields:
                self.refused_fields.append(refused)

    def _body(self, prompt: str, bit_width: int | None) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": self.max_tokens, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "ignore_eos": True}
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if bit_width is not None:
            body["bit_width"] = bit_width
        return body

    async def _attempt(self, content: bytes, bit_width: int | None) -> "Answer | Failure | _Refusal":
        reads: list[tuple[float, bytes]] = []
        url = self.base_url + _PATHS[self.endpoint]
        sent = time.perf_counter()
        try:
            async with (
                asyncio.timeout(self.timeout_seconds),
                self.http.stream("POST", url, content=content) as response,
            ):
                if response.status_code != 200:
                    await response.aread()
                    return _Refusal(response.status_code, response.text)
                # Nothing is parsed before the end, so that one answer's parsing delays no other's chunks.
                async for piece in response.aiter_bytes():
                    reads.append((time.perf_counter(), piece))
        except TimeoutError:
            return Failure("timeout", f"No complete answer within {self.timeout_seconds:g} s.")
        except httpx.HTTPError as error:
            return Failure("connection", describe(error))
        return read_answer(sent, reads, bit_width)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """An answer with another status than 200."""

    status: int
    text: str

    def names(self, body: dict[str, Any]) -> str | None:
        """The optional field of `body` that the server does not know, if that is why it refused."""
        if self.status not in (400, 422):
            return None
        return next((name for name in _OPTIONAL_FIELDS if name in body and name in self.text), None)

    @property
    def failure(self) -> Failure:
        kind = "429" if self.status == 429 else f"{self.status // 100}xx"
        return Failure(kind, f"Status {self.status}: {body_message(self.text)}")


def body_message(text: str) -> str:
    """What the body of an error response says."""
    try:
        return error_message(msgspec.json.decode(text))
    except msgspec.DecodeError:
        return shorten(text) or "no explanation"


def describe(error: httpx.HTTPError) -> str:
    """A transport error in words; some have none of their own."""
    return shorten(str(error)) or type(error).__name__
