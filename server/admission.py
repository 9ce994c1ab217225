"""How much may wait: a queue bounded in sequences and in prompt tokens, counted at the moment it is checked."""

import math
import time
from collections.abc import Callable

from anybit.server.errors import QueueFullError, Rejection

_MAX_RETRY_AFTER_SECONDS = 60
_WAIT_SMOOTHING = 0.2


class Admission:
    """The sequences that were let in and have not produced their first token.

    An empty queue takes any valid request, however many sequences or tokens it brings: otherwise a request larger
    than the limits would be told to retry for ever.
    """

    def __init__(self, max_requests: int, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.clock = clock
        self.num_waiting = 0
        self.waiting_tokens = 0
        self._mean_wait_seconds = 1.0

    @property
    def full(self) -> bool:
        return self.num_waiting >= self.max_requests or self.waiting_tokens >= self.max_tokens

    @property
    def retry_after_seconds(self) -> int:
        """How long a sequence lately waited for its first token: the best guess for when there is room again."""
        return min(_MAX_RETRY_AFTER_SECONDS, max(1, math.ceil(self._mean_wait_seconds)))

    def enter(self, num_sequences: int) -> "Ticket":
        """Count `num_sequences` as waiting; raises QueueFullError when there is no room for them."""
        if self.num_waiting > 0 and self.num_waiting + num_sequences > self.max_requests:
            raise QueueFullError(
                f"{self.num_waiting} requests are waiting already; try again later.",
                retry_after_seconds=self.retry_after_seconds,
                reason=Rejection.QUEUE_FULL,
            )
        self.num_waiting += num_sequences
        return Ticket(self, num_sequences)

    def add_tokens(self, num_tokens: int) -> None:
        """Count prompt tokens as waiting; raises QueueFullError when there is no room for them."""
        if self.waiting_tokens > 0 and self.waiting_tokens + num_tokens > self.max_tokens:
            raise QueueFullError(
                f"Requests with {self.waiting_tokens} prompt tokens are waiting already; try again later.",
                retry_after_seconds=self.retry_after_seconds,
                reason=Rejection.TOKEN_BUDGET,
            )
        self.waiting_tokens += num_tokens

    def leave(self, num_sequences: int, num_tokens: int) -> None:
        self.num_waiting -= num_sequences
        self.waiting_tokens -= num_tokens

    def record_wait(self, seconds: float) -> None:
        self._mean_wait_seconds += _WAIT_SMOOTHING * (seconds - self._mean_wait_seconds)


class Ticket:
    """One HTTP request's share of the queue; `release` gives back whatever is left of it, once."""

    def __init__(self, admission: Admission, num_sequences: int) -> None:
        self._admission = admission
        self._entered = admission.clock()
        self._uncounted = num_sequences  # sequences whose tokens are not known yet
        self._waiting: dict[int, int] = {}  # sequence -> prompt tokens

    def add_tokens(self, tokens_per_sequence: list[int]) -> None:
        """Count the prompts of all sequences, in order; raises QueueFullError."""
        self._admission.add_tokens(sum(tokens_per_sequence))
        self._waiting = dict(enumerate(tokens_per_sequence))
        self._uncounted -= len(tokens_per_sequence)

    def started(self, sequence: int) -> None:
        """A sequence produced something and waits no longer; repeated calls are ignored."""
        num_tokens = self._waiting.pop(sequence, None)
        if num_tokens is not None:
            self._admission.leave(1, num_tokens)
            self._admission.record_wait(self._admission.clock() - self._entered)

    def release(self) -> None:
        """Leave the queue altogether; safe to call twice."""
        self._admission.leave(self._uncounted + len(self._waiting), sum(self._waiting.values()))
        self._uncounted = 0
        self._waiting = {}
