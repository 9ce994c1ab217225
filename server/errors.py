"""Every way a request can fail: one class, one HTTP status, one sentence, in OpenAI's shape."""

import json
import logging
from enum import StrEnum
from typing import Any, ClassVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from anybit.engine.errors import (
    AnyBitError,
    CapacityError,
    EngineDrainingError,
    EngineLoadingError,
    EngineLostError,
)

logger = logging.getLogger("anybit.server")

MAX_ECHO_CHARACTERS = 100


class Rejection(StrEnum):
    """Why a request was refused; the values of the `reason` metric label."""

    INVALID = "invalid"
    TOO_LONG = "too_long"
    TOO_LARGE = "too_large"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    QUEUE_FULL = "queue_full"
    TOKEN_BUDGET = "token_budget"
    LOADING = "loading"
    DRAINING = "draining"
    UNAVAILABLE = "unavailable"


class APIError(Exception):
    """A failure with an HTTP status; `str(error)` is a sentence that says what to do."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None
    default_reason: ClassVar[Rejection | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        reason: Rejection | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.default_code
        self.reason = reason or self.default_reason
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def to_json(self) -> bytes:
        # ASCII escapes, because a field name sent by a client may hold what UTF-8 cannot encode.
        return json.dumps(self.body, ensure_ascii=True, separators=(",", ":")).encode("ascii")


class InvalidRequestError(APIError):
    """The request is wrong and would be wrong again."""

    status = 400
    type = "invalid_request_error"
    default_reason = Rejection.INVALID


class ContextLengthError(InvalidRequestError):
    """Prompt and answer can never fit into the context."""

    default_code = "context_length_exceeded"
    default_reason = Rejection.TOO_LONG


class AuthenticationError(APIError):
    """The key is missing or wrong."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"
    default_reason = Rejection.UNAUTHORIZED


class ModelNotFoundError(APIError):
    """The named model is not served here."""

    status = 404
    type = "invalid_request_error"
    default_code = "model_not_found"
    default_reason = Rejection.NOT_FOUND


class BodyTooLargeError(APIError):
    """The request body is over the limit."""

    status = 413
    type = "invalid_request_error"
    default_code = "body_too_large"
    default_reason = Rejection.TOO_LARGE


class QueueFullError(APIError):
    """The queue has no room now; `retry_after_seconds` says when to come back."""

    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"
    default_reason = Rejection.QUEUE_FULL

    def __init__(self, message: str, *, retry_after_seconds: int, reason: Rejection) -> None:
        super().__init__(message, code=reason.value, reason=reason, headers={"Retry-After": str(retry_after_seconds)})


class ServerFaultError(APIError):
    """Something broke that the client is not to blame for."""


class UnavailableError(APIError):
    """The engine is loading, draining or gone."""

    status = 503
    type = "unavailable_error"
    default_code = "unavailable"
    default_reason = Rejection.UNAVAILABLE


class RequestTimeoutError(APIError):
    """The answer was not finished in time."""

    status = 503
    type = "timeout_error"
    default_code = "request_timeout"


def unexpected_error() -> ServerFaultError:
    """What a client is told of a fault in this server."""
    return ServerFaultError("The server met an unexpected error; try again, and report the X-Request-Id if it stays.")


def shorten(text: str) -> str:
    """`text` as far as an error message or a log line should repeat it."""
    return text if len(text) <= MAX_ECHO_CHARACTERS else text[:MAX_ECHO_CHARACTERS] + "…"


def to_api_error(error: AnyBitError) -> APIError:
    """The HTTP form of a failure that the engine reported."""
    sentence = str(error) or type(error).__name__
    match error:
        case CapacityError():
            return ContextLengthError(sentence)
        case EngineLoadingError():
            return UnavailableError(sentence, code="loading", reason=Rejection.LOADING)
        case EngineDrainingError():
            return UnavailableError(sentence, code="draining", reason=Rejection.DRAINING)
        case EngineLostError():
            return UnavailableError(sentence, code="engine_lost")
        case _:
            return ServerFaultError(sentence)


def error_response(error: APIError) -> Response:
    return Response(error.to_json(), error.status, error.headers, media_type="application/json")


async def send_error(send: Send, error: APIError, *, more_body: bool = False) -> None:
    """Send `error` as a whole response; with `more_body` its end is left open."""
    body = error.to_json()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


async def handle_api_error(request: Request, error: Exception) -> Response:
    """Exception handler of APIError and AnyBitError."""
    if isinstance(error, APIError):
        return error_response(error)
    if isinstance(error, AnyBitError):
        return error_response(to_api_error(error))
    raise error


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """Exception handler of what the router refuses: an unknown route or a wrong method."""
    if not isinstance(error, HTTPException):
        raise error
    path = shorten(request.scope["path"])
    match error.status_code:
        case 404:
            message, code = f"There is no route {path}; see /openapi.json.", "route_not_found"
        case 405:
            message, code = f"{path} does not answer {request.method}.", "method_not_allowed"
        case _:
            message, code = str(error.detail), "http_error"
    failure = InvalidRequestError(message, code=code)
    return Response(failure.to_json(), error.status_code, error.headers, media_type="application/json")
