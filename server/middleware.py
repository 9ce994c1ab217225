"""What surrounds every request: its id, its response headers, the last net for errors, and the limit of its body."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anybit.engine.logs import current_request_id
from anybit.server.errors import BodyTooLargeError, InvalidRequestError, Rejection, send_error, unexpected_error

logger = logging.getLogger("anybit.server")

REQUEST_ID_HEADER = "X-Request-Id"
_SCOPE_KEY = "anybit.request"
_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_DISCARD_SECONDS = 10.0


@dataclass(slots=True)
class RequestInfo:
    """What is known of one HTTP request from its first byte on."""

    id: str
    arrival: float  # time.monotonic()
    response_headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def set_response_header(self, name: str, value: str) -> None:
        """Send this header with whatever response follows, an error included."""
        self.response_headers.append((name.lower().encode("latin-1"), value.encode("latin-1")))


def request_info(scope: Scope) -> RequestInfo:
    """The RequestInfo that RequestContextMiddleware put into `scope`."""
    info = scope[_SCOPE_KEY]
    if not isinstance(info, RequestInfo):
        raise TypeError("the scope did not pass RequestContextMiddleware")
    return info


class RequestContextMiddleware:
    """Gives every request an id and every response its headers; turns an escaped exception into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        info = RequestInfo(_request_id(scope), time.monotonic())
        info.set_response_header(REQUEST_ID_HEADER, info.id)
        scope[_SCOPE_KEY] = info
        current_request_id.set(info.id)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), *info.response_headers]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:
            if started:
                # Nothing true can be said any more; the server closes the connection and logs the traceback.
                raise
            logger.exception("request %s: unexpected error on %s %r", info.id, scope["method"], scope["path"])
            await send_error(send_with_headers, unexpected_error())


def _request_id(scope: Scope) -> str:
    sent: list[bytes] = [value for name, value in scope["headers"] if name == REQUEST_ID_HEADER.lower().encode()]
    if len(sent) == 1 and _SANE_REQUEST_ID.fullmatch(sent[0]):
        return sent[0].decode("ascii")
    return f"req-{uuid.uuid4().hex}"


class BodyLimitMiddleware:
    """Reads the body before the application does and refuses one over `max_bytes` or slower than `timeout_seconds`."""

    def __init__(
        self, app: ASGIApp, max_bytes: int, timeout_seconds: float, count_rejection: Callable[[Rejection], None]
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_seconds = timeout_seconds
        self.count_rejection = count_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = _content_length(scope)
        if declared is not None and declared > self.max_bytes:
            await self._refuse(receive, send)
            return
        try:
            async with asyncio.timeout(self.timeout_seconds):
                body = await self._read(receive)
        except _BodyOverLimitError:
            await self._refuse(receive, send)
            return
        except TimeoutError:
            self.count_rejection(Rejection.INVALID)
            message = "The request body did not arrive in time."
            await send_error(send, InvalidRequestError(message, code="body_timeout", headers={"Connection": "close"}))
            return
        if body is None:
            return  # the client left before its request was complete
        replayed = False

        async def receive_body() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_body, send)

    async def _read(self, receive: Receive) -> bytes | None:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size > self.max_bytes:
                raise _BodyOverLimitError
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _refuse(self, receive: Receive, send: Send) -> None:
        self.count_rejection(Rejection.TOO_LARGE)
        error = BodyTooLargeError(
            f"The request body is larger than the {self.max_bytes} bytes this server takes.",
            headers={"Connection": "close"},
        )
        await send_error(send, error, more_body=True)
        # Closing while the client still writes would reset the connection and take the answer with it,
        # so what arrives is thrown away for a while.
        try:
            async with asyncio.timeout(_DISCARD_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        break
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _BodyOverLimitError(Exception):
    pass


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return None
