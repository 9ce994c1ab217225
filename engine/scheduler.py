"""Continuous batching: which tokens the next step computes, and whose keys and values stay in memory.

Decoding sequences go first in every step; what is left of the step's token budget goes to prompts, in order of arrival.
A sequence gets pages for the tokens it has when it is admitted and one more whenever it grows into it. When there is
none left, the youngest sequence is preempted: it gives up its pages and is computed again later, with the same tokens.
The oldest sequence is never preempted for another and fits the whole cache, so something always gets done. Formats of keys
and values have pages of their own, and sequences of one never wait for pages of another.
"""

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field, replace
from itertools import count

from anybit.engine.chunk import Chunk
from anybit.engine.errors import CapacityError
from anybit.engine.sequence import Sequence
from anybit.kvcache.books import FormatPages, PageBooks
from anybit.kvcache.prefix import PageKeys, root_key
from anybit.kvcache.spec import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """`max_step_tokens` bounds the tokens of one step, so that a long prompt delays others by no more than that.

    `checkpoint_hash` tells models apart in the keys of the prefix cache; None turns the prefix cache off.
    """

    max_num_seqs: int
    max_step_tokens: int
    checkpoint_hash: str | None


@dataclass(slots=True)
class SchedulerCounters:
    """What happened since the start."""

    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    sealed_pages: Counter[str] = field(default_factory=Counter)  # by KV format


class Scheduler:
    """Owns the waiting and the running sequences, both in order of arrival, and their pages."""

    def __init__(self, books: PageBooks, config: SchedulerConfig) -> None:
        self.books = books
        self._config = config
        self.counters = SchedulerCounters()
        self._arrivals = count()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []

    def apart(self) -> "Scheduler":
        """Another one of the same pages, with no prefix cache and counters of its own."""
        return Scheduler(self.books, replace(self._config, checkpoint_hash=None))

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def running(self) -> frozenset[Sequence]:
        return frozenset(self._running)

    def running_by_width(self) -> dict[int, int]:
        return dict(Counter(sequence.bit_width for sequence in self._running))

    def waiting_by_width(self) -> dict[int, int]:
        return dict(Counter(sequence.bit_width for sequence in self._waiting))

    def sequences(self) -> list[Sequence]:
        """Running, then waiting."""
        return [*self._running, *self._waiting]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; CapacityError if it could not run even alone."""
        request = sequence.request
        sequence.kv_format = request.kv_format or self.books.default
        if sequence.kv_format not in self.books.formats:
            raise CapacityError(f"KV format {sequence.kv_format} is not served.")
        pages = self._pages_of(sequence)
        needed = pages.spec.pages_for(sequence.max_tokens_cached)
        if needed > pages.allocator.num_pages:
            raise CapacityError(
                f"The request needs {needed} pages of KV cache but the server has {pages.allocator.num_pages}; "
                "ask for fewer tokens."
            )
        # What a lifted row leaves in its pages depends on who was beside it: nobody shares such pages.
        if self._config.checkpoint_hash is not None and not request.precision.at_least:
            root = root_key(
                self._config.checkpoint_hash,
                request.precision.content_hash,
                sequence.kv_format,
                request.cache_salt,
            )
            sequence.page_keys = PageKeys(root, has_first=not pages.spec.is_exact)
        sequence.arrival_number = next(self._arrivals)
        self._waiting.append(sequence)

    def find(self, request_id: str) -> Sequence | None:
        for sequence in self.sequences():
            if sequence.request.request_id == request_id:
                return sequence
        return None

    def schedule(self, now: float) -> list[Chunk]:
        """The next step's chunks, at most `max_step_tokens` tokens; empty when nothing can run."""
        if not self._extend_running():
            self._admit(now)  # else what was just taken away would be taken back
        chunks = [Chunk(sequence, 1) for sequence in self._running if sequence.num_pending == 1]
        budget = self._config.max_step_tokens - len(chunks)
        for sequence in self._running:
            if sequence.num_pending > 1 and budget > 0:
                chunk = Chunk(sequence, min(sequence.num_pending, budget))
                chunks.append(chunk)
                budget -= chunk.num_tokens
        chunks = chunks[: self._config.max_step_tokens]
        for chunk in chunks:
            self._assign_slots(chunk.sequence, chunk.sequence.num_computed + chunk.num_tokens)
        return chunks

    def extend_ahead(self, chunks: ReadOnly[Chunk]) -> bool:
        """Give each sequence of a decode step that is still under way room for one more token, before that step is recorded.

        False, and nothing is changed, unless the next step will be the same sequences' next tokens whatever the tokens
        are, but for those that stop: nobody waits who could come in, nobody reaches a limit, and there are pages for all.
        """
        sequences = [chunk.sequence for chunk in chunks]
        if frozenset(sequences) != self.running or (self._waiting and len(sequences) < self._config.max_num_seqs):
            return False
        if any(not chunk.completes or chunk.sequence.is_near_limit for chunk in chunks):
            return False
        wanted = {
            sequence: self._pages_of(sequence).spec.pages_for(len(sequence.token_ids) + 1) - len(sequence.pages)
            for sequence in sequences
        }
        given: dict[Sequence, list[int]] = {}
        for sequence, num_pages in wanted.items():
            found = self._pages_of(sequence).allocator.allocate(num_pages)
            if found is None:
                for owner, taken in given.items():
                    self._pages_of(owner).allocator.release(taken)
                return False
            given[sequence] = found
        for sequence, found in given.items():
            sequence.pages += found
            self._assign_slots(sequence, sequence.num_computed + 2)
        return True

    def record(self, chunks: list[Chunk]) -> None:
        """Take note that a step has computed these chunks; pages that are full now can be found by later sequences."""
        for chunk in chunks:
            sequence = chunk.sequence
            before, sequence.num_computed = sequence.num_computed, sequence.num_computed + chunk.num_tokens
            pages = self._pages_of(sequence)
            num_full = sequence.num_computed // PAGE_SIZE - before // PAGE_SIZE
            if num_full == 0:
                continue
            if not pages.spec.is_exact:
                self.counters.sealed_pages[sequence.kv_format] += num_full
            if sequence.page_keys is not None:
                keys = sequence.page_keys.first(sequence.num_computed // PAGE_SIZE, sequence.token_ids)
                for page in range(pages.spec.pages_for(before // PAGE_SIZE * PAGE_SIZE), len(keys)):
                    pages.allocator.index.insert(keys[page], sequence.pages[page])
            self.books.slots.release(sequence.own_slots[:num_full])
            del sequence.own_slots[:num_full]

    def remove(self, sequence: Sequence, *, keep_pages: bool = True) -> None:
        """Forget a sequence that ended and give its pages back; unless `keep_pages`, nobody will find their content."""
        if sequence in self._running:
            self._running.remove(sequence)
            if not keep_pages:
                for page_id in sequence.pages:
                    self._pages_of(sequence).allocator.index.discard(page_id)
            self._give_up_pages(sequence)
        else:
            self._waiting.remove(sequence)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pages, index and running sequences agree."""
        tables: dict[str, list[list[int]]] = {}
        for sequence in self._running:
            tables.setdefault(sequence.kv_format, []).append(sequence.pages)
        self.books.check(tables, (sequence.own_slots for sequence in self._running))

    def _pages_of(self, sequence: Sequence) -> FormatPages:
        return self.books.formats[sequence.kv_format]

    def _assign_slots(self, sequence: Sequence, num_tokens: int) -> None:
        """Give a sequence of a sealed format the exact pages that its tokens up to the `num_tokens`-th are written to."""
        if not self._pages_of(sequence).spec.is_exact:
            wanted = (num_tokens - 1) // PAGE_SIZE - sequence.num_computed // PAGE_SIZE + 1
            sequence.own_slots += self.books.slots.allocate(max(wanted - len(sequence.own_slots), 0))

    def _extend_running(self) -> bool:
        """Give every running sequence pages for all its tokens; whether others had to be preempted for that."""
        preempted = False
        for sequence in list(self._running):
            pages = self._pages_of(sequence)
            while sequence in self._running:
                found = pages.allocator.allocate(pages.spec.pages_for(len(sequence.token_ids)) - len(sequence.pages))
                if found is not None:
                    sequence.pages += found
                    break
                self._preempt(next(s for s in reversed(self._running) if s.kv_format == sequence.kv_format))
                preempted = True
        return preempted

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._give_up_pages(sequence)
        sequence.num_computed = 0
        insort(self._waiting, sequence, key=_by_arrival)
        self.counters.preemptions += 1

    def _give_up_pages(self, sequence: Sequence) -> None:
        self._pages_of(sequence).allocator.release(sequence.pages)
        self.books.slots.release(sequence.own_slots)
        sequence.pages, sequence.own_slots = [], []

    def _admit(self, now: float) -> None:
        """Move sequences from waiting to running, in order of arrival: a small one never overtakes a large one for good.

        One whose next page is just being computed by another waits for it, which lets younger ones pass meanwhile; one for
        whom there are no pages holds up those of its own format alone.
        """
        short_of_pages: set[str] = set()
        for sequence in list(self._waiting):
            if len(self._running) >= self._config.max_num_seqs:
                return
            if sequence.kv_format in short_of_pages:
                continue
            keys = self._shareable_keys(sequence)
            shared = self._pages_of(sequence).allocator.index.find(keys)
            if len(shared) < len(keys) and keys[len(shared)] in self._keys_in_progress():
                continue
            if not self._assign_pages(sequence, shared):
                short_of_pages.add(sequence.kv_format)
                continue
            if sequence.scheduled_at is None:
                sequence.scheduled_at = now
                sequence.num_cached_tokens = sequence.num_computed
                self.counters.prefix_queried_tokens += sequence.num_prompt_tokens
                self.counters.prefix_hit_tokens += sequence.num_computed
            self._waiting.remove(sequence)
            insort(self._running, sequence, key=_by_arrival)

    def _assign_pages(self, sequence: Sequence, shared: list[int]) -> bool:
        """Give a sequence the shared pages and new ones for the rest of its tokens; False if there are too few."""
        pages = self._pages_of(sequence)
        num_shared = self._whole_pages(sequence, shared)
        shared = shared[: pages.spec.pages_for(num_shared * PAGE_SIZE)]
        pages.allocator.share(shared)  # first, so that they are not taken for something else
        needed = pages.spec.pages_for(len(sequence.token_ids)) - len(shared)
        # Every running sequence may grow by a page soon: without this headroom it would preempt the one just admitted.
        growing = sum(other.kv_format == sequence.kv_format for other in self._running)
        found = (
            None if growing and needed + growing > pages.allocator.num_available else pages.allocator.allocate(needed)
        )
        if found is None:
            pages.allocator.release(shared)
            return False
        sequence.pages = shared + found
        sequence.num_computed = num_shared * PAGE_SIZE
        return True

    def _whole_pages(self, sequence: Sequence, shared: list[int]) -> int:
        """Pages of tokens among shared ones, of which a sealed format's first holds none that others do not."""
        return len(shared) if self._pages_of(sequence).spec.is_exact else max(len(shared) - 1, 0)

    def _shareable_keys(self, sequence: Sequence) -> list[bytes]:
        """Keys of the pages a sequence need not compute itself: at least its newest token must run through the model."""
        if sequence.page_keys is None or sequence.wants_prompt_logprobs:
            return []
        return sequence.page_keys.first((len(sequence.token_ids) - 1) // PAGE_SIZE, sequence.token_ids)

    def _keys_in_progress(self) -> set[bytes]:
        return {key for sequence in self._running for key in self._keys_to_come(sequence)}

    def _keys_to_come(self, sequence: Sequence) -> Iterator[bytes]:
        """Keys of the full pages that a prefill in progress has still to compute."""
        if sequence.page_keys is not None and sequence.num_pending > 1:
            keys = sequence.page_keys.first(len(sequence.token_ids) // PAGE_SIZE, sequence.token_ids)
            num_full = sequence.num_computed // PAGE_SIZE * PAGE_SIZE
            yield from keys[self._pages_of(sequence).spec.pages_for(num_full) :]


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival_number
