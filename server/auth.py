"""Who may ask: bearer keys, decided on the very path that routing uses."""

import hashlib
import hmac
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from anybit.server.errors import AuthenticationError, Rejection, send_error


class BearerAuthMiddleware:
    """Guards every path outside `open_paths` with a bearer key.

    The path is `scope["path"]`, never one rebuilt from the Host header; keys are kept as SHA-256 digests, and all of
    them are compared in constant time, so that time tells neither a key nor its place.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        open_paths: frozenset[str],
        count_rejection: Callable[[Rejection], None],
    ) -> None:
        self.app = app
        self.open_paths = open_paths
        self.digests = tuple(hashlib.sha256(key.encode("ascii")).digest() for key in keys)
        self.count_rejection = count_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._allows(scope):
            await self.app(scope, receive, send)
            return
        self.count_rejection(Rejection.UNAUTHORIZED)
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        message = "Send a valid API key as 'Authorization: Bearer KEY'."
        await send_error(send, AuthenticationError(message, headers={"WWW-Authenticate": "Bearer"}))

    def _allows(self, scope: Scope) -> bool:
        if scope["type"] == "http" and scope["path"] in self.open_paths:
            return True
        values: list[bytes] = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return False
        scheme, _, token = values[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(token.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return any(matches)
