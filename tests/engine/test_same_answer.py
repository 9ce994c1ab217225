"""ARCHITECTURE, "Same answer": what a request is told does not depend on what is computed beside it or how it is cut.

The model has sizes that common ones lack: five groups a row, and a vocabulary that is no multiple of 64.
"""

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anybit.engine.core import EngineCore
from anybit.engine.models.decoder import Decoder
from anybit.engine.precision import Precision
from anybit.engine.quantize.run import QuantizeOptions, quantize
from anybit.engine.sampling import sample
from anybit.engine.types import FinishReason, SamplingParams
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import NestedLoader
from anybit.kernels.layout import BIT_WIDTHS
from tests.fixtures.engine import RecordingDecoder, make_core, make_request, run, tokens_by_request
from tests.fixtures.native import NOT_BUILT
from tests.fixtures.tiny_llama import decoder_of, save_llama, tiny_llama

VOCAB_SIZE = 520
POISON = 519  # a token whose embedding is not finite
SHAPES = [(1, 2), (5, 8), (63, 4), (64, 3), (65, 6), (130, 2), (40, 8), (2, 4)]  # prompt length, width


def prompt(length, seed):
    return torch.randint(VOCAB_SIZE - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


REQUESTS = [
    make_request(f"r{index}", prompt(length, index), 6, width, temperature=index % 2 * 1.5, seed=index)
    for index, (length, width) in enumerate(SHAPES)
]


class Answers:
    """Tokens, and the logits of each, by request."""

    def __init__(self, tokens: dict[str, list[int]], logits: dict[str, list[torch.Tensor]]) -> None:
        self.tokens = tokens
        self.logits = logits


class Model:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def core(self, **limits) -> tuple[EngineCore, RecordingDecoder]:
        recording = RecordingDecoder(self.decoder)
        return make_core(recording, **limits), recording

    def together(self, requests, **limits) -> Answers:
        """All requests are there from the start."""
        core, recording = self.core(**limits)
        return Answers(run(core, requests), recording.logits_of)

    def alone(self, requests, **limits) -> Answers:
        """Each request in an engine of its own, whole prompt in one step."""
        answers = [self.together([request], **limits) for request in requests]
        return Answers(merged(answer.tokens for answer in answers), merged(answer.logits for answer in answers))


def merged(dictionaries: Iterable[dict]) -> dict:
    return {key: value for dictionary in dictionaries for key, value in dictionary.items()}


@pytest.fixture(scope="module", params=[True, False], ids=["native", "portable"])
def model(request, tmp_path_factory):
    llama = tiny_llama(
        hidden_size=320,
        intermediate_size=160,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=VOCAB_SIZE,
        initializer_range=0.08,
    )
    source = HuggingFaceSource(save_llama(llama, tmp_path_factory.mktemp("source")))
    directory = tmp_path_factory.mktemp("checkpoint")
    quantize(source, directory, QuantizeOptions())
    config = json.loads((directory / "config.json").read_text())
    reader = CheckpointReader(directory)
    decoder = decoder_of(config, NestedLoader(reader, BIT_WIDTHS, 8, native=request.param))
    if request.param and decoder.native is None:
        pytest.skip(NOT_BUILT)  # test_bindings.py fails where a compiler was at hand
    embedding = NestedLoader(reader, BIT_WIDTHS, 8, native=False).vocabulary("model.embed_tokens")
    embedding.weight.affine[8].zero[:, POISON] = torch.nan
    return Model(replace(decoder, embedding=embedding))


@pytest.fixture(scope="module")
def alone(model):
    return model.alone(REQUESTS)


def assert_same(answers, expected, names=None):
    """The answers to `names` (all that were given) are the expected ones, bit for bit."""
    for name in names or answers.tokens:
        for row, (got, wanted) in enumerate(zip(answers.logits[name], expected.logits[name], strict=True)):
            different = int((got != wanted).sum())
            assert different == 0, f"{different} of {len(wanted)} logits of token {row} of {name} differ"
        assert answers.tokens[name] == expected.tokens[name]


def finish(core, recording, events) -> Answers:
    while core.has_work:
        events += core.step()
    core.check_integrity()
    return Answers(tokens_by_request(events), recording.logits_of)


def test_requests_are_worth_comparing(alone):
    """Else a model that always says the same would pass everything below."""
    assert all(len(alone.tokens[request.request_id]) == 6 for request in REQUESTS)
    assert len({tuple(answer) for answer in alone.tokens.values()}) == len(REQUESTS)


def test_tokens_are_drawn_from_the_logits_with_the_seed_of_the_request_and_their_position(alone):
    for request in REQUESTS:
        name, params = request.request_id, request.sampling
        drawn = [sample(row[None], [params], [position])[0] for position, row in enumerate(alone.logits[name])]
        assert alone.tokens[name] == drawn


def test_width_changes_the_answer(model):
    answers = [model.together([replace(REQUESTS[2], precision=request.precision)]) for request in REQUESTS[:5]]
    assert len({tuple(answer.logits["r2"][0].tolist()) for answer in answers}) == len(BIT_WIDTHS)


@pytest.mark.parametrize(("max_step_tokens", "max_num_seqs"), [(1000, 8), (256, 8), (64, 3), (17, 8), (7, 5), (1, 2)])
def test_together_gives_what_each_gets_alone(model, alone, max_step_tokens, max_num_seqs):
    assert_same(model.together(REQUESTS, max_step_tokens=max_step_tokens, max_num_seqs=max_num_seqs), alone)


def test_at_least_a_width_is_that_width_alone_and_a_wider_one_in_its_company(model, alone):
    name, prompt = "lifted", [5, 6, 7, 8, 9]

    def request(precision):
        return make_request(name, prompt, 6, precision, logit_bias={POISON: -100.0})

    exact = {width: model.alone([request(width)]) for width in (2, 8)}
    lifted = request(Precision(2, at_least=True))
    assert_same(model.alone([lifted]), exact[2])
    company = make_request("company", [9, 8, 7], 12, 8, logit_bias={POISON: -100.0})
    assert_same(model.together([lifted, company]), exact[8], [name])
    core, _ = model.core()
    run(core, [lifted, make_request("long", prompt * 30, 1, Precision(2, at_least=True))])
    assert not any(core.take_stats().kv_bytes_cached.values()), "pages of lifted rows may be found by others"


def test_prompt_longer_than_a_step_gets_the_same_answer(model, alone):
    assert_same(model.together([REQUESTS[5]], max_step_tokens=50), alone)


def test_order_of_arrival_changes_no_bit(model, alone):
    assert_same(model.together(REQUESTS[::-1], max_step_tokens=400, max_num_seqs=4), alone)


def test_together_on_two_threads_gives_what_each_gets_alone_on_two(model):
    torch.set_num_threads(2)
    short = [replace(REQUESTS[index], sampling=SamplingParams(2, temperature=0.0)) for index in (1, 7)]
    assert_same(model.together(short), model.alone(short))


def test_float32_cache_gives_the_same_answer_in_any_batch_too(model):
    chosen = [REQUESTS[index] for index in (1, 2, 4)]
    together = model.together(chosen, kv_format="float32", max_num_seqs=2)
    assert_same(together, model.alone(chosen, kv_format="float32"))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.permutations(range(len(REQUESTS))),
    st.integers(1, len(REQUESTS)),
    st.lists(st.integers(0, 4), min_size=len(REQUESTS), max_size=len(REQUESTS)),
    st.sampled_from((3, 20, 65, 300)),
    st.integers(1, 8),
)
def test_arrivals_while_others_run_change_no_bit(model, alone, order, count, pauses, max_step_tokens, max_num_seqs):
    core, recording = model.core(max_step_tokens=max_step_tokens, max_num_seqs=max_num_seqs)
    events = []
    for index, pause in zip(order[:count], pauses, strict=False):
        events += core.add(REQUESTS[index])
        for _ in range(pause):
            events += core.step()
    assert_same(finish(core, recording, events), alone)


def test_pages_used_before_by_others_change_no_bit(model, alone):
    core, recording = model.core(num_pages=3, max_num_seqs=1)
    run(core, [REQUESTS[5], make_request("other", prompt(150, 99), 20, 8)])
    recording.logits_of.clear()
    again = [REQUESTS[index] for index in (2, 5, 0, 4)]
    assert_same(Answers(run(core, again), recording.logits_of), alone)


def test_prefix_hits_change_no_bit(model, alone):
    core, recording = model.core()
    run(core, [replace(request, request_id=f"first {request.request_id}") for request in REQUESTS])
    assert_same(Answers(run(core, REQUESTS), recording.logits_of), alone, [request.request_id for request in REQUESTS])
    assert core.take_stats().prefix_hit_tokens > 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_changes_no_bit(model, prefix_cache):
    requests = [
        make_request(f"p{index}", prompt(length, index), 70, width, temperature=0.5 * index, seed=index)
        for index, (length, width) in enumerate(((180, 4), (60, 2), (100, 8), (50, 4)))
    ]
    core, recording = model.core(num_pages=6, prefix_cache=prefix_cache)
    together = Answers(run(core, requests), recording.logits_of)
    assert core.take_stats().preemptions > 0
    assert_same(together, model.alone(requests))


def test_neighbour_that_leaves_changes_no_bit(model, alone):
    core, recording = model.core()
    events = [event for request in REQUESTS[:4] for event in core.add(request)]
    events += [*core.step(), *core.step(), *core.abort("r1"), *core.abort("r3")]
    assert_same(finish(core, recording, events), alone, ["r0", "r2"])


def poisoned_request(length, position=-1):
    token_ids = prompt(length, 7)
    token_ids[position] = POISON
    return make_request("poisoned", token_ids, 5, 8)


def test_request_that_is_not_finite_fails_and_its_neighbours_keep_every_bit(model, alone):
    core, recording = model.core()
    requests = (REQUESTS[1], poisoned_request(40), REQUESTS[6], REQUESTS[2])
    events = [event for request in requests for event in core.add(request)]
    answers = finish(core, recording, events)
    assert [event.request_id for event in events if event.finish_reason is FinishReason.ERROR] == ["poisoned"]
    assert_same(answers, alone, ["r1", "r6", "r2"])


def test_request_that_is_not_finite_leaves_nothing_in_its_pages(model, alone):
    core, recording = model.core(num_pages=2)
    core.add(poisoned_request(100))
    (event,) = core.step()
    assert event.finish_reason is FinishReason.ERROR
    assert_same(Answers(run(core, [REQUESTS[1], REQUESTS[6]]), recording.logits_of), alone)


def test_request_that_is_not_finite_and_leaves_in_mid_prompt_leaves_nothing_in_its_pages(model, alone):
    core, recording = model.core(num_pages=2, max_step_tokens=50)
    core.add(poisoned_request(100, position=20))
    assert core.step() == []
    core.abort("poisoned")
    assert_same(Answers(run(core, [REQUESTS[1], REQUESTS[6]]), recording.logits_of), alone)
