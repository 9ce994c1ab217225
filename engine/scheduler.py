"""Continuous batching: which tokens the next step computes.

A sequence is admitted when all pages it can ever need are free, so that whatever runs can finish. Decoding sequences
go first in every step; what is left of the step's token budget goes to prompts, in order of arrival.
"""

from collections import Counter, deque

from anybit.engine.batch import Chunk
from anybit.engine.errors import CapacityError
from anybit.engine.sequence import Sequence
from anybit.kvcache.allocator import PageAllocator
from anybit.kvcache.check import check_integrity
from anybit.kvcache.spec import KVSpec


class Scheduler:
    """Owns the waiting and the running sequences and their pages."""

    def __init__(self, spec: KVSpec, allocator: PageAllocator, max_num_seqs: int, max_step_tokens: int) -> None:
        self._spec = spec
        self._allocator = allocator
        self._max_num_seqs = max_num_seqs
        self._max_step_tokens = max_step_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def running_by_width(self) -> dict[int, int]:
        return dict(Counter(sequence.bit_width for sequence in self._running))

    def waiting_by_width(self) -> dict[int, int]:
        return dict(Counter(sequence.bit_width for sequence in self._waiting))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; CapacityError if it could not run even alone."""
        needed = self._spec.pages_for(sequence.max_tokens_cached)
        if needed > self._allocator.num_pages:
            raise CapacityError(
                f"The request needs {needed} pages of KV cache but the server has {self._allocator.num_pages}; "
                "ask for fewer tokens."
            )
        self._waiting.append(sequence)

    def find(self, request_id: str) -> Sequence | None:
        for sequence in self.sequences():
            if sequence.request.request_id == request_id:
                return sequence
        return None

    def schedule(self, now: float) -> list[Chunk]:
        """The next step's chunks, at most `max_step_tokens` tokens; empty when nothing can run."""
        self._admit(now)
        chunks = [Chunk(sequence, 1) for sequence in self._running if sequence.num_pending == 1]
        budget = self._max_step_tokens - len(chunks)
        for sequence in self._running:
            if sequence.num_pending > 1 and budget > 0:
                chunk = Chunk(sequence, min(sequence.num_pending, budget))
                chunks.append(chunk)
                budget -= chunk.num_tokens
        return chunks[: self._max_step_tokens]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended and give its pages back."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._allocator.release(sequence.pages)
            sequence.pages = []
        else:
            self._waiting.remove(sequence)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pages and running sequences agree."""
        check_integrity(self._allocator, (sequence.pages for sequence in self._running))

    def _admit(self, now: float) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            pages = self._allocator.allocate(self._spec.pages_for(sequence.max_tokens_cached))
            if pages is None:
                return  # in order of arrival: a small request never overtakes a large one for good
            sequence.pages = pages
            sequence.scheduled_at = now
            self._running.append(self._waiting.popleft())

    def sequences(self) -> list[Sequence]:
        """Running, then waiting."""
        return [*self._running, *self._waiting]
