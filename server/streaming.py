"""Answers on the wire: one JSON body, or server-sent events as the tokens come.

Nothing here validates: what goes out was made here, and every token passes through.
"""

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from anybit.engine.errors import AnyBitError
from anybit.server.errors import APIError, Rejection, RequestTimeoutError, to_api_error, unexpected_error
from anybit.server.generation import Generation, Piece
from anybit.server.logprobs import ReportedToken, chat_logprobs, completion_logprobs
from anybit.server.metrics.sequences import Outcome
from anybit.server.token_text import TokenTexts

logger = logging.getLogger("anybit.server")

# A client that stopped reading must not hold the handler for ever after its time is up.
_LAST_WORDS_SECONDS = 5.0

# Proxies pass events on as they come; nginx holds them back unless it is told.
_STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every body and every chunk of one answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    bit_width: int


@dataclass(frozen=True, slots=True)
class StreamSettings:
    include_usage: bool
    continuous_usage: bool


class AnswerShape(ABC):
    """How an endpoint writes choices; one object per answer."""

    body_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, texts: TokenTexts) -> None:
        self.texts = texts

    @abstractmethod
    def choice(self, index: int, text: str, finish_reason: str, tokens: list[ReportedToken]) -> dict[str, Any]:
        """A finished choice in a whole answer."""

    @abstractmethod
    def chunk_choice(self, piece: Piece) -> dict[str, Any]:
        """A piece of a choice in a stream; pieces come in order."""


class CompletionShape(AnswerShape):
    body_object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, index: int, text: str, finish_reason: str | None, tokens: list[ReportedToken]) -> dict[str, Any]:
        logprobs = completion_logprobs(tokens, self.texts) if tokens else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def chunk_choice(self, piece: Piece) -> dict[str, Any]:
        return self.choice(piece.choice, piece.text, piece.finish_reason, piece.tokens)


class ChatShape(AnswerShape):
    body_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts) -> None:
        super().__init__(texts)
        self._begun: set[int] = set()

    def choice(self, index: int, text: str, finish_reason: str, tokens: list[ReportedToken]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish_reason}

    def chunk_choice(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text}
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            delta = {"role": "assistant", "content": piece.text}
        logprobs = self._logprobs(piece.tokens)
        return {"index": piece.choice, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _logprobs(self, tokens: list[ReportedToken]) -> dict[str, Any] | None:
        return chat_logprobs(tokens, self.texts) if tokens else None


class GenerationResponse(Response):
    """Runs a generation and sends it; a client that leaves ends it, and its sequences in the engine.

    The status line waits for the first engine event, so that a failure before it is an ordinary error response; a
    later one is an SSE error event, after which the stream ends without [DONE].
    """

    def __init__(
        self,
        generation: Generation,
        head: AnswerHead,
        shape: AnswerShape,
        stream: StreamSettings | None,
        count_rejection: Callable[[Rejection], None],
    ) -> None:
        super().__init__()
        self._generation = generation
        self._head = head
        self._shape = shape
        self._settings = stream
        self._count_rejection = count_rejection
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = Outcome.ABORT
        try:
            await _until_disconnect(receive, self._run(send))
        except APIError as error:
            outcome = Outcome.TIMEOUT if isinstance(error, RequestTimeoutError) else Outcome.ERROR
            if self._started and self._settings is not None:
                await self._send_last_words(send, error)
                return
            if error.reason is not None:
                outcome = Outcome.REJECTED
                self._count_rejection(error.reason)
            raise
        finally:
            self._generation.close(outcome)

    async def _run(self, send: Send) -> None:
        timeout = asyncio.timeout(self._generation.deadline - time.monotonic())
        try:
            async with timeout:
                await (self._send_whole(send) if self._settings is None else self._send_stream(send, self._settings))
        except TimeoutError:
            if not timeout.expired():
                raise
            raise RequestTimeoutError("The answer was not finished in time; ask for fewer tokens.") from None
        except APIError:
            raise
        except AnyBitError as error:
            raise to_api_error(error) from error
        except Exception:
            if not self._started:
                raise
            logger.exception("request %s: unexpected error in a stream", self._generation.origin.request_id)
            raise unexpected_error() from None

    async def _send_whole(self, send: Send) -> None:
        texts: list[list[str]] = [[] for _ in self._generation.requests]
        tokens: list[list[ReportedToken]] = [[] for _ in texts]
        finish_reasons = [""] * len(texts)
        async with contextlib.aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.choice].append(piece.text)
                tokens[piece.choice] += piece.tokens
                if piece.finish_reason is not None:
                    finish_reasons[piece.choice] = piece.finish_reason
        choices = [
            self._shape.choice(index, "".join(parts), finish_reasons[index], tokens[index])
            for index, parts in enumerate(texts)
        ]
        body = self._fields(self._shape.body_object, choices)
        body["usage"] = self._usage(self._generation.num_generated_tokens)
        content = _encode(body)
        self._started = True
        await _start(send, b"application/json", (b"content-length", str(len(content)).encode("ascii")))
        await send({"type": "http.response.body", "body": content, "more_body": False})

    async def _send_stream(self, send: Send, settings: StreamSettings) -> None:
        # Only `choices` and `usage` differ from chunk to chunk.
        chunk = self._fields(self._shape.chunk_object, [])
        if settings.include_usage:
            chunk["usage"] = None
        async with contextlib.aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                if not self._started:
                    self._started = True
                    await _start(send, b"text/event-stream; charset=utf-8", *_STREAM_HEADERS)
                chunk["choices"] = [self._shape.chunk_choice(piece)]
                if settings.continuous_usage:
                    chunk["usage"] = self._usage(self._generation.num_generated_tokens)
                await _send_event(send, _encode(chunk))
        if settings.include_usage:
            chunk["choices"] = []
            chunk["usage"] = self._usage(self._generation.num_generated_tokens)
            await _send_event(send, _encode(chunk))
        await _send_event(send, b"[DONE]", more_body=False)

    async def _send_last_words(self, send: Send, error: APIError) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await _send_event(send, error.to_json(), more_body=False)

    def _fields(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "object": name,
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.system_fingerprint,
            "choices": choices,
        }

    def _usage(self, num_generated_tokens: int) -> dict[str, Any]:
        num_prompt_tokens = self._generation.num_prompt_tokens
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_generated_tokens,
            "total_tokens": num_prompt_tokens + num_generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self._generation.num_cached_tokens},
            "bit_width": self._head.bit_width,
        }


async def _start(send: Send, content_type: bytes, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type), *headers]})


async def _send_event(send: Send, data: bytes, *, more_body: bool = True) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more_body})


async def _until_disconnect(receive: Receive, work: Awaitable[None]) -> None:
    """Await `work`, and cancel it when the client leaves first."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
