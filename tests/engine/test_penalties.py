"""Penalties and biases, by definition, and only on the rows that ask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.engine.penalties import adjust_logits
from anybit.engine.sequence import Sequence
from tests.fixtures.engine import make_request
from tests.fixtures.nested import normal

VOCAB = 12
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=20)


def sequence(prompt, generated, **sampling):
    made = Sequence(make_request("one", prompt, **sampling), arrived_at=0.0)
    made.token_ids += generated
    return made


def expected(logits, prompt, generated, presence=0.0, frequency=0.0, repetition=1.0, bias=()):
    adjusted = []
    for token, given_logit in enumerate(logits):
        logit = given_logit
        if token in prompt or token in generated:
            logit = logit / repetition if logit > 0 else logit * repetition
        logit -= presence * (token in generated) + frequency * generated.count(token)
        adjusted.append(logit + dict(bias).get(token, 0.0))
    return adjusted


@settings(max_examples=80, deadline=None)
@given(
    tokens.filter(len),
    tokens,
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.1, 10),
    st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
    st.integers(0, 1000),
)
def test_logits_follow_the_definition(prompt, generated, presence, frequency, repetition, bias, seed):
    logits = normal(1, VOCAB, seed=seed)
    want = torch.tensor(
        [expected(logits[0].tolist(), prompt, generated, presence, frequency, repetition, bias.items())]
    )
    options = {"presence_penalty": presence, "frequency_penalty": frequency, "repetition_penalty": repetition}
    adjust_logits(logits, [sequence(prompt, generated, logit_bias=bias, **options)])
    assert torch.allclose(logits, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sampling", [{"presence_penalty": 1.0}, {"logit_bias": {3: -100.0}}])
def test_neighbours_keep_their_logits(sampling):
    logits = normal(3, VOCAB)
    before = logits.clone()
    adjust_logits(logits, [sequence([1], [3]), sequence([1], [3], **sampling), sequence([1], [3])])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert logits[1, 3] < before[1, 3]
