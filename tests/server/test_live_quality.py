"""Answers that are scored again: what is computed, what is counted, and that answering comes first."""

import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anybit.engine.types import GenerationRequest, TokenEvent, TokenLogprob
from anybit.server.live_quality import NUM_LIKELIEST, kl_lower_bound
from tests.server.fake_engine import FakeEngine
from tests.waiting import wait_until

PROBABILITIES = {8: {4: 0.75, 5: 0.25}, 4: {4: 0.5, 5: 0.5}, 2: {4: 0.25, 5: 0.75}, 3: {4: 0.75, 5: 0.25}}
"""What each width of ScoringEngine believes of every next token."""


@dataclass
class ScoringEngine(FakeEngine):
    """Its prompt scores depend on the width alone."""

    async def _events(self, request: GenerationRequest):
        async for event in super()._events(request):
            yield self._scored(request, event)

    def _scored(self, request: GenerationRequest, event: TokenEvent) -> TokenEvent:
        if not event.prompt_logprobs:
            return event
        believed = PROBABILITIES[request.precision.bit_width]
        top = sorted(((token, math.log(share)) for token, share in believed.items()), key=lambda pair: -pair[1])
        return TokenEvent(
            event.request_id, [], prompt_logprobs=[TokenLogprob(4, 0.0, top) for _ in event.prompt_logprobs]
        )


def divergence(width: int) -> float:
    return sum(p * math.log(p / PROBABILITIES[width][token]) for token, p in PROBABILITIES[8].items())


def settled(server, count: int) -> None:
    def total() -> float:
        families = server.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in families if line.startswith("anybit_shadow_requests_total{"))

    wait_until(lambda: total() == count, "the answers were not scored")


def test_answers_are_scored_at_their_width_and_at_the_highest(start):
    server = start(ScoringEngine(), shadow_rate=1.0)
    for width, max_tokens in ((4, 6), (4, 10), (2, 5), (8, 7)):
        assert server.complete(bit_width=width, max_tokens=max_tokens).status_code == 200
    settled(server, 3)
    for width, tokens, agreements in ((4, 16, 16), (2, 5, 0), (3, 0, 0), (8, 0, 0)):
        label = {"bit_width": str(width)}
        assert server.metric("anybit_shadow_tokens_total", **label) == tokens
        assert server.metric("anybit_shadow_top1_agreements_total", **label) == agreements
        kl = server.metric("anybit_shadow_kl_nats_total", **label)
        assert kl == pytest.approx(tokens * divergence(width), abs=1e-9)
    scoring = [request for request in server.engine.requests if request.request_id.startswith("shadow-")]
    asked = [request for request in server.engine.requests if not request.request_id.startswith("shadow-")]
    assert [request.precision.bit_width for request in scoring] == [8, 4, 8, 4, 8, 2]
    assert all(request.sampling.max_tokens == 0 for request in scoring)
    assert all(request.sampling.num_prompt_logprobs == NUM_LIKELIEST for request in scoring)
    prompt, answer = asked[0].prompt_token_ids, server.engine.tokens(asked[0])[0]
    assert scoring[0].prompt_token_ids == scoring[1].prompt_token_ids == prompt + answer
    # Requests that nobody sent are in no series of requests.
    assert server.metric("anybit_generated_tokens_total", bit_width="4") == 16


def test_nothing_is_scored_unless_asked_for(start):
    server = start(ScoringEngine())
    server.complete(bit_width=4)
    assert server.service.live_quality is None
    assert len(server.engine.requests) == 1
    assert server.metric("anybit_shadow_requests_total", bit_width="4", outcome="scored") == 0


def test_share_of_answers_is_the_rate(start):
    server = start(ScoringEngine(), shadow_rate=0.25)
    server.service.live_quality._generator = random.Random(3)
    for _ in range(40):
        server.complete(bit_width=4, max_tokens=2)
    draws = random.Random(3)
    expected = sum(draws.random() < 0.25 for _ in range(40))
    assert 5 <= expected <= 15
    settled(server, expected)


def test_engine_that_fails_is_counted_and_answers_go_on(start):
    engine = ScoringEngine()
    server = start(engine, shadow_rate=1.0)
    engine.abort_after = 3  # of answers that are longer, and of those that have none
    assert server.complete(bit_width=4, max_tokens=3).status_code == 200
    settled(server, 1)
    engine.abort_after = 0
    server.complete(bit_width=4, max_tokens=1)
    engine.abort_after = None
    assert server.complete(bit_width=4, max_tokens=3).status_code == 200


def test_more_answers_than_can_be_scored_are_skipped(start):
    engine = ScoringEngine()
    server = start(engine, shadow_rate=1.0)
    engine.hold = True
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(server.complete, bit_width=4, max_tokens=2, n=16)
        wait_until(lambda: len(engine.running) == 16, "the choices did not begin")
        engine.hold = False  # so that all of them end together
        assert answered.result().status_code == 200
    settled(server, 16)
    scored = server.metric("anybit_shadow_requests_total", bit_width="4", outcome="scored")
    skipped = server.metric("anybit_shadow_requests_total", bit_width="4", outcome="skipped")
    assert (scored, skipped) == (8, 8)


def test_answer_that_may_have_been_lifted_is_not_scored(start):
    server = start(ScoringEngine(), shadow_rate=1.0)
    assert server.complete(max_tokens=2, model="tiny@at-least-4bit").status_code == 200
    assert server.complete(max_tokens=2, bit_width=4).status_code == 200
    settled(server, 1)


shares = st.lists(st.floats(0.001, 1.0), min_size=3, max_size=40)


@given(shares, shares, st.integers(1, 40))
def test_bound_is_below_the_divergence_and_reaches_it_with_all_tokens(first, second, num_known):
    size = min(len(first), len(second))
    p, q = ({i: x / sum(part[:size]) for i, x in enumerate(part[:size])} for part in (first, second))
    exact = sum(p[i] * math.log(p[i] / q[i]) for i in p)

    def likeliest(shares: dict[int, float], count: int) -> dict[int, float]:
        return {i: math.log(shares[i]) for i in sorted(shares, key=shares.__getitem__, reverse=True)[:count]}

    bound = kl_lower_bound(likeliest(p, num_known), likeliest(q, num_known))
    assert 0 <= bound <= exact + 1e-5
    assert kl_lower_bound(likeliest(p, size), likeliest(q, size)) == pytest.approx(exact, abs=1e-5)


def test_same_distribution_has_no_divergence():
    top = {3: math.log(0.9), 5: math.log(0.05)}
    assert kl_lower_bound(top, top) == 0
