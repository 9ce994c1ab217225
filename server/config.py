"""What the server is told at its start."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from anybit.engine.errors import AnyBitError

ALIAS_SUFFIX = re.compile(r"@([^@]*)bit$")
_ORIGIN = re.compile(r"https?://[^/\s?#@]+")


class ConfigError(AnyBitError):
    """A setting of the server is out of its range."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of one server; checked here once, raises ConfigError."""

    model_name: str  # the id under which clients ask for the model
    checkpoint_dir: Path  # tokenizer.json and the chat template are read from here
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # empty: no key is asked for
    max_body_bytes: int = 2 * 1024 * 1024
    max_queued_requests: int = 256  # sequences that have not produced their first token
    max_queued_tokens: int = 262_144  # prompt tokens of those sequences
    request_timeout_seconds: float = 3600.0  # from arrival to the last token
    body_timeout_seconds: float = 60.0  # from the first header to the end of the request body
    drain_timeout_seconds: float = 30.0
    stall_seconds: float = 60.0  # an engine silent for longer counts as stalled
    shadow_rate: float = 0.0  # share of answers that are scored again at the highest width
    otlp_endpoint: str = ""  # base address of an OpenTelemetry collector; empty: no traces
    allowed_origins: tuple[str, ...] = ()  # of web pages that may ask, as browsers name them; "*" is any

    def __post_init__(self) -> None:
        _check_model_name(self.model_name)
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("An API key must be printable ASCII text without spaces.")
        # Port 0 lets the system choose a free one.
        _check_range("port", self.port, 0, 65_535)
        _check_range("max_body_bytes", self.max_body_bytes, 1024, 1024**3)
        _check_range("max_queued_requests", self.max_queued_requests, 1, 1_000_000)
        _check_range("max_queued_tokens", self.max_queued_tokens, 1, 1_000_000_000)
        _check_range("request_timeout_seconds", self.request_timeout_seconds, 0.001, 1e7)
        _check_range("body_timeout_seconds", self.body_timeout_seconds, 0.001, 1e7)
        _check_range("drain_timeout_seconds", self.drain_timeout_seconds, 0, 1e7)
        _check_range("stall_seconds", self.stall_seconds, 0.001, 1e7)
        _check_range("shadow_rate", self.shadow_rate, 0, 1)
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"{origin!r} is no origin of web pages, such as https://chat.example.com, nor *.")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError("The address of an OpenTelemetry collector must begin with http:// or https://.")


def _check_model_name(name: str) -> None:
    if not name or len(name) > 256 or not name.isprintable():
        raise ConfigError("The model name must be 1 to 256 printable characters.")
    # Such a name could not be told from an alias of a shorter one.
    if ALIAS_SUFFIX.search(name):
        raise ConfigError("The model name must not end like '@4bit'; that is how a client asks for a bit-width.")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} must lie between {low} and {high}.")
