"""Any mix of arrivals, departures, failures and steps: budgets hold, nothing is lost, everyone gets their own tokens."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from anybit.engine.types import FinishReason
from tests.fixtures.engine import make_request
from tests.fixtures.fake_runner import BYTES_READ, KV_FORMATS, SPEC, FakeRunner, answer_of, fake_core

MAX_MODEL_LEN = 300
lengths = st.one_of(st.integers(1, 5), st.integers(1, MAX_MODEL_LEN))


class CoreMachine(RuleBasedStateMachine):
    """`expected` holds the requests in order of arrival; `received` what each was told."""

    @initialize(
        num_pages=st.integers(1, 12),
        max_num_seqs=st.integers(1, 5),
        max_step_tokens=st.sampled_from((1, 2, 7, 64, 1000)),
        runs_ahead=st.booleans(),
    )
    def start(self, num_pages, max_num_seqs, max_step_tokens, runs_ahead):
        self.runner = FakeRunner(runs_ahead)
        self.runner.on_run = self.check_step
        self.core = fake_core(self.runner, num_pages, max_num_seqs, max_step_tokens, MAX_MODEL_LEN)
        self.limits = (num_pages, max_num_seqs, max_step_tokens)
        self.expected = {}
        self.received = {}
        self.finished = {}
        self.disturbed = set()

    @rule(
        prompt=lengths,
        text=st.integers(0, 2),  # few, so that prompts begin alike
        max_tokens=st.one_of(st.integers(0, 4), st.integers(0, MAX_MODEL_LEN)),
        width=st.sampled_from((2, 4, 8, 3)),
        stops=st.sets(st.integers(0, 49), max_size=3),
        kv_format=st.sampled_from(KV_FORMATS),
    )
    def add(self, prompt, text, max_tokens, width, stops, kv_format):
        name = f"r{len(self.expected)}"
        token_ids = [text] * prompt
        request = make_request(name, token_ids, max_tokens, width, kv_format, stop_token_ids=tuple(stops))
        self.expected[name] = request
        self.received[name] = []
        events = self.core.add(request)
        pages = SPEC.of_format(kv_format).pages_for(prompt + max(max_tokens, 1) - 1)
        possible = max_tokens <= MAX_MODEL_LEN - prompt and width in BYTES_READ and pages <= self.limits[0]
        assert possible == (not events)
        if not possible:
            self.disturbed.add(name)
        self.take(events)

    @precondition(lambda self: self.core.has_work)
    @rule()
    def step(self):
        before = len(self.runner.steps)
        self.take(self.core.step())
        started = len(self.runner.steps) - before
        assert started == 1 or self.runner.runs_ahead, "there was work but nothing ran"
        assert 0 <= started <= 2

    @precondition(lambda self: self.core.has_work and self.runner.runs_ahead)
    @rule()
    def step_that_is_undecided(self):
        self.runner.undecided_next = True
        self.take(self.core.step())
        self.runner.undecided_next = False

    @precondition(lambda self: self.core.has_work)
    @rule()
    def step_that_fails(self):
        self.runner.fail_next = True
        ended = set(self.finished)
        events = self.core.step()
        names = {chunk.sequence.request.request_id for chunk in self.runner.steps[-1]} - ended
        assert {event.request_id for event in events} == names
        assert all(event.finish_reason is FinishReason.ERROR for event in events)
        self.disturbed |= names
        self.take(events)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from([*self.expected, "unknown"]))
        ended = name in self.finished or name == "unknown"
        events = self.core.abort(name)
        assert [event.finish_reason for event in events] == ([] if ended else [FinishReason.ABORT])
        if not ended:
            self.disturbed.add(name)
        self.take(events)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def poison(self, data):
        name = data.draw(st.sampled_from(list(self.expected)))
        if name not in self.finished:
            self.runner.poisoned.add(name)
            self.disturbed.add(name)

    @invariant()
    def books_agree(self):
        if not hasattr(self, "core"):
            return
        self.core.check_integrity()
        stats = self.core.take_stats()
        running, waiting = self.core._scheduler._running, self.core._scheduler._waiting
        assert sum(stats.running.values()) == len(running) <= self.limits[1]
        assert sum(stats.waiting.values()) == len(waiting)
        assert stats.kv_pages_used == len(
            {(sequence.kv_format, page) for sequence in running for page in sequence.pages}
        )
        assert all(not sequence.pages and sequence.num_computed == 0 for sequence in waiting)
        alive = {sequence.request.request_id for sequence in (*running, *waiting)}
        assert alive == set(self.expected) - set(self.finished)

    def check_step(self, chunks):
        """Called with every step's chunks, before they are computed."""
        _, max_num_seqs, max_step_tokens = self.limits
        names = [chunk.sequence.request.request_id for chunk in chunks]
        assert len(set(names)) == len(names) <= max_num_seqs
        assert 1 <= sum(chunk.num_tokens for chunk in chunks) <= max_step_tokens
        assert all(1 <= chunk.num_tokens <= chunk.sequence.num_pending for chunk in chunks)
        running, waiting = self.core._scheduler._running, self.core._scheduler._waiting
        arrivals = [sequence.arrival_number for sequence in running]
        assert arrivals == sorted(arrivals)
        arrivals = [sequence.arrival_number for sequence in waiting]
        assert arrivals == sorted(arrivals)
        for chunk in chunks:
            spec = SPEC.of_format(chunk.sequence.kv_format)
            assert len(chunk.sequence.pages) == spec.pages_for(len(chunk.sequence.token_ids))
        # The oldest of all always runs: whatever else is taken back, it gets on.
        oldest = min((*running, *waiting), key=lambda sequence: sequence.arrival_number)
        assert oldest in running

    def take(self, events):
        for event in events:
            assert event.request_id not in self.finished, "an event after the last"
            self.received[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                self.finished[event.request_id] = event.finish_reason

    def teardown(self):
        if not hasattr(self, "core"):
            return
        # Preempted sequences are computed again, but the oldest one always advances.
        steps = sum(len(r.prompt_token_ids) + r.sampling.max_tokens for r in self.expected.values())
        for _ in range(2 * steps):
            if self.core.has_work:
                self.step()
        assert not self.core.has_work, "a request never ends"
        self.books_agree()
        assert self.core.take_stats().kv_pages_used == 0
        for name, request in self.expected.items():
            tokens, reason = answer_of(request)
            if name in self.disturbed:
                assert self.received[name] == tokens[: len(self.received[name])]
            else:
                assert (self.received[name], self.finished[name]) == (tokens, reason)


TestEngineCore = CoreMachine.TestCase
TestEngineCore.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
