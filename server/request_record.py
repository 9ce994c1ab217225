"""What is known of a request once it has ended: the source of its log line and of its trace."""

import logging
from dataclasses import dataclass

from anybit.server.metrics.sequences import Outcome

logger = logging.getLogger("anybit.server")


@dataclass(frozen=True, slots=True)
class RequestOrigin:
    """Where a request came from and what for."""

    request_id: str
    operation: str  # "text_completion" or "chat", as OpenTelemetry calls them
    model: str  # as the client asked for it
    arrival: float  # time.monotonic()
    trace_headers: dict[str, str]  # `traceparent` and `tracestate`, as far as the client sent them


@dataclass(frozen=True, slots=True)
class SequenceRecord:
    """One choice. Times are of `time.monotonic()`; the seconds were measured by the engine, between its own events."""

    outcome: Outcome
    num_generated_tokens: int
    queue_seconds: float | None
    prefill_seconds: float | None
    first_token_at: float | None
    last_token_at: float | None


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One HTTP request that reached the engine."""

    origin: RequestOrigin
    bit_width: str  # the metric label
    kv_format: str
    num_prompt_tokens: int  # a prompt with several choices counts once
    num_cached_tokens: int
    end: float  # time.monotonic()
    sequences: tuple[SequenceRecord, ...]

    @property
    def num_generated_tokens(self) -> int:
        return sum(sequence.num_generated_tokens for sequence in self.sequences)

    @property
    def seconds(self) -> float:
        return self.end - self.origin.arrival

    @property
    def outcomes(self) -> str:
        """The different ways in which choices ended."""
        return ",".join(sorted({sequence.outcome for sequence in self.sequences}))


def log_request(record: RequestRecord) -> None:
    """One line for people, whose numbers are fields of their own where lines are JSON."""
    fields = {
        "request_id": record.origin.request_id,
        "operation": record.origin.operation,
        "bit_width": record.bit_width,
        "kv_format": record.kv_format,
        "choices": len(record.sequences),
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "generated_tokens": record.num_generated_tokens,
        "outcome": record.outcomes,
        "seconds": round(record.seconds, 6),
    }
    logger.info(
        "request %s: width=%s choices=%d prompt_tokens=%d generated_tokens=%d outcome=%s seconds=%.3f",
        record.origin.request_id,
        record.bit_width,
        len(record.sequences),
        record.num_prompt_tokens,
        record.num_generated_tokens,
        record.outcomes,
        record.seconds,
        extra=fields,
    )
