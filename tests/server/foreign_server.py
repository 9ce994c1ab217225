"""A server of another make: answers what a test scripts, over real sockets, in the loop of the test."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

Reply = AsyncIterator[bytes]
Script = Callable[[dict[str, Any]], Reply]

MODELS = {"object": "list", "data": [{"id": "their-model"}, {"id": "second"}]}


class ForeignServer:
    """Every POST is answered by `script`, whose pieces are written as they come; its end closes the connection."""

    def __init__(self, script: Script, models: Any = MODELS) -> None:
        self.script = script
        self.models = models
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.running = 0
        self.most_running = 0
        self.url = ""

    async def __aenter__(self) -> "ForeignServer":
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        # A client that gave up is not this server's concern.
        with contextlib.suppress(ConnectionError):
            async for piece in self._reply(head, reader):
                writer.write(piece)
                await writer.drain()
            writer.close()
        self.running -= 1

    async def _reply(self, head: str, reader: asyncio.StreamReader) -> Reply:
        if head.startswith("POST"):
            length = next(line for line in head.lower().splitlines() if line.startswith("content-length:"))
            self.bodies.append(json.loads(await reader.readexactly(int(length.split(":")[1]))))
            async for piece in self.script(self.bodies[-1]):
                yield piece
        elif head.startswith("GET /v1/models ") and self.models is not None:
            yield whole(200, self.models)
        else:
            yield whole(404, {"error": {"message": "no such route"}})


def whole(status: int, body: Any) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM_END = b"0\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(value: Any) -> bytes:
    return chunked(b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n")


async def answer(body: dict[str, Any], seconds: float = 0.0) -> Reply:
    """What a well-behaved server streams, in the shape that the body asks for."""
    yield STREAM_HEAD
    is_chat = "messages" in body
    if is_chat:
        yield event({"choices": [{"delta": {"role": "assistant", "content": None}}]})
    for index in range(body["max_tokens"]):
        await asyncio.sleep(seconds)
        last = "length" if index == body["max_tokens"] - 1 and not is_chat else None
        yield event({"choices": [{"delta": {"content": "x"}} if is_chat else {"text": "x", "finish_reason": last}]})
    if is_chat:
        yield event({"choices": [{"delta": {}, "finish_reason": "length"}]})
    if body.get("stream_options", {}).get("include_usage"):
        yield event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": body["max_tokens"]}})
    yield event(b"[DONE]") + STREAM_END
