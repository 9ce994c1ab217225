"""Log probabilities that the engine reports are those of the model, however the tokens were scheduled."""

import json

import pytest
import torch

from anybit.engine.logprobs import score_rows, token_logprobs
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import NestedLoader
from anybit.kernels.layout import BIT_WIDTHS
from tests.fixtures.engine import cached_logits, make_core, make_request, run
from tests.fixtures.tiny_llama import decoder_of

PROMPT = torch.randint(0, 512, (150,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    return decoder_of(config, NestedLoader(CheckpointReader(tiny_checkpoint), BIT_WIDTHS, 8))


def scores_of(core, request):
    events = list(core.add(request))
    while core.has_work:
        events += core.step()
    core.check_integrity()
    events = [event for event in events if event.request_id == request.request_id]
    return (
        [entry for event in events for entry in event.prompt_logprobs],
        [entry for event in events for entry in event.logprobs],
        [token for event in events for token in event.token_ids],
    )


def expected_scores(decoder, token_ids):
    return torch.log_softmax(cached_logits(decoder, token_ids, len(token_ids)), -1)


@pytest.mark.parametrize("max_step_tokens", [7, 64, 1000])
def test_prompt_is_scored_as_by_a_direct_pass(decoder, max_step_tokens):
    core = make_core(decoder, max_step_tokens=max_step_tokens, kv_format="float32")
    request = make_request("a", PROMPT, 3, num_prompt_logprobs=2, num_logprobs=2)
    prompt_scores, scores, tokens = scores_of(core, request)
    assert [entry.token_id for entry in prompt_scores] == PROMPT[1:]
    assert [entry.token_id for entry in scores] == tokens
    expected = expected_scores(decoder, PROMPT + tokens)
    for position, entry in enumerate([*prompt_scores, *scores]):
        assert abs(entry.logprob - float(expected[position, entry.token_id])) < 1e-4
        values, ids = expected[position].topk(2)
        assert [token_id for token_id, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_greedy_tokens_are_the_likeliest_to_the_last_bit(decoder):
    _, scores, _ = scores_of(make_core(decoder), make_request("a", PROMPT, 5, num_logprobs=1))
    assert all(entry.top == [(entry.token_id, entry.logprob)] for entry in scores)


def test_scores_do_not_depend_on_neighbours_prefix_hits_or_widths_of_others(decoder):
    request = make_request("a", PROMPT, 0, num_prompt_logprobs=0)
    alone = scores_of(make_core(decoder), request)
    core = make_core(decoder, max_step_tokens=40)
    run(core, [make_request("before", PROMPT, 1)])
    for width in BIT_WIDTHS:
        core.add(make_request(f"w{width}", PROMPT[width:], 4, width))
    assert scores_of(core, request)[0] == alone[0]


def test_preempted_prompt_is_scored_once(decoder):
    core = make_core(decoder, num_pages=5, max_step_tokens=100, prefix_cache=False)
    core.add(make_request("old", PROMPT + PROMPT[:34], 40))
    scored = make_request("scored", PROMPT[:60], 30, num_prompt_logprobs=0, num_logprobs=0)
    prompt_scores, scores, tokens = scores_of(core, scored)
    assert core.take_stats().preemptions > 0
    assert (len(prompt_scores), len(scores), len(tokens)) == (59, 30, 30)


def test_logprobs_are_those_before_temperature_penalties_and_biases(decoder):
    plain = scores_of(make_core(decoder), make_request("a", PROMPT, 1, num_logprobs=5))[1]
    biased = scores_of(
        make_core(decoder),
        make_request("a", PROMPT, 1, num_logprobs=5, temperature=1.7, logit_bias={9: 100.0}, repetition_penalty=1.5),
    )[1]
    assert biased[0].token_id == 9
    assert biased[0].top == plain[0].top


def test_rows_are_scored_in_pieces_of_bounded_size():
    class Head:
        def __init__(self):
            self.weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
            self.largest = 0

        def logits(self, hidden):
            self.largest = max(self.largest, len(hidden))
            return hidden @ self.weight

    head, hidden = Head(), torch.randn(150, 16)
    token_ids = [row % 40 for row in range(150)]
    scores = score_rows(head, hidden, token_ids, 3)
    assert head.largest <= 64
    whole = token_logprobs(hidden @ head.weight, token_ids, [3] * 150)
    assert [entry.logprob for entry in scores] == pytest.approx([entry.logprob for entry in whole], abs=1e-5)
    assert score_rows(head, hidden[:0], [], 3) == []
