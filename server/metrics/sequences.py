"""What is counted for each sequence, by the bit-width that it asked for."""

from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import Counter, Histogram


class Outcome(StrEnum):
    """How a sequence ended; the values of the `outcome` metric label."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REJECTED = "rejected"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class WidthMetrics:
    """The request-level series of one bit-width."""

    requests: dict[Outcome, Counter]
    prompt_tokens: Counter
    generated_tokens: Counter
    time_to_first_token: Histogram
    inter_token_latency: Histogram
    duration: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram

    def record_scheduled(self, queue_seconds: float | None, prefill_seconds: float | None) -> None:
        if queue_seconds is not None:
            self.queue.observe(queue_seconds)
        if prefill_seconds is not None:
            self.prefill.observe(prefill_seconds)

    def record_first_tokens(self, num_prompt_tokens: int, num_tokens: int, seconds: float) -> None:
        self.prompt_tokens.inc(num_prompt_tokens)
        self.generated_tokens.inc(num_tokens)
        self.time_to_first_token.observe(seconds)

    def record_next_tokens(self, num_tokens: int, seconds: float) -> None:
        """Tokens that came together share the time since the last ones."""
        self.generated_tokens.inc(num_tokens)
        for _ in range(num_tokens):
            self.inter_token_latency.observe(seconds / num_tokens)

    def record_end(self, outcome: Outcome, duration_seconds: float, decode_seconds: float | None) -> None:
        self.requests[outcome].inc()
        self.duration.observe(duration_seconds)
        if decode_seconds is not None:
            self.decode.observe(decode_seconds)
