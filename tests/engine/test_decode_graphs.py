"""Captured decode steps: what they compute, for whom, and how they are padded."""

import pytest
import torch

from anybit.engine.bench.random_weight import random_weight
from anybit.engine.bench.shapes import Shape
from anybit.engine.chunk import Chunk
from anybit.engine.decode_graphs import DecodeGraphs, StepResult, padded_pages, padded_rows
from anybit.engine.runner import Runner, _launched
from anybit.engine.sampling import UNDECIDED, FoundTokens
from anybit.engine.sequence import Sequence
from anybit.engine.step_inputs import StepShape
from anybit.kernels import fallbacks, reference
from anybit.kernels.layout import BIT_WIDTHS
from tests.fixtures.engine import make_core, make_request, run


def test_rows_and_pages_are_padded_to_few_sizes():
    assert [padded_rows(count) for count in (1, 2, 3, 4, 5, 9, 16, 17, 33, 64)] == [1, 2, 4, 4, 8, 16, 16, 32, 48, 64]
    assert [padded_pages(count) for count in (1, 8, 9, 32, 33, 128, 129)] == [8, 8, 32, 32, 128, 128, 512]
    assert {padded_rows(count) for count in range(1, 257)} == {1, 2, 4, 8, *range(16, 257, 16)}


def test_only_steps_of_several_widths_tell_which_rows_have_which():
    assert StepShape(16, (2, 8), 8).num_widths == 16
    assert StepShape(48, (2, 8), 8).num_widths == 64  # those of rows, and of such as fill passes of many rows
    assert StepShape(16, (4,), 8).num_widths == 0


def test_only_steps_of_one_token_a_sequence_are_covered():
    def sequence(computed, **sampling):
        request = make_request("a", [5, 6, 7], **sampling)
        result = Sequence(request, arrived_at=0.0)
        result.num_computed = computed
        return result

    graphs = DecodeGraphs.__new__(DecodeGraphs)
    assert graphs.covers([Chunk(sequence(2), 1)])
    assert not graphs.covers([Chunk(sequence(1), 2)])
    assert not graphs.covers([Chunk(sequence(1), 1)])  # a piece of a prompt
    assert not graphs.covers([Chunk(sequence(1), 1), Chunk(sequence(2), 1)])
    assert graphs.covers([Chunk(sequence(2, num_prompt_logprobs=0), 1)])
    assert not graphs.covers([Chunk(sequence(0, num_prompt_logprobs=0), 1)])
    assert not graphs.covers([Chunk(sequence(2), 1)] * 257)


def test_a_sequence_that_was_undecided_once_is_followed_by_no_early_step():
    sequence = Sequence(make_request("a", [5], temperature=1.0, top_p=0.99), arrived_at=0.0)
    tokens = iter(([7], [UNDECIDED]))

    class Decode:
        shape, sequences = StepShape(1, (4,), 8, has_draws=True), (sequence,)

        def result(self):
            return StepResult(torch.zeros(1, 10), FoundTokens(next(tokens), has_draws=True))

    runner, step = Runner.__new__(Runner), _launched((), Decode())
    (sampled,) = step.result(True).sampled
    assert sampled.token_id == 7
    assert runner.can_launch_after(step)
    assert step.result(True).is_undecided
    assert not runner.can_launch_after(step)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 3.0}], ids=str)
def test_texts_alone_and_in_a_mixed_batch_are_equal_and_eager_steps_agree(tiny_gpu_decoder, sampling):
    generator = torch.Generator().manual_seed(3)
    requests = [
        make_request(
            str(index),
            torch.randint(4, 500, (length,), generator=generator).tolist(),
            24,
            width,
            seed=index,
            **(sampling if index % 3 else {}),
        )
        for index, (width, length) in enumerate([(4, 30), (2, 100), (8, 7), (4, 63), (3, 64), (6, 1), (2, 5)])
    ]
    before = fallbacks.snapshot()
    together = run(make_core(tiny_gpu_decoder), requests)
    for request in requests:
        assert run(make_core(tiny_gpu_decoder), [request]) == {request.request_id: together[request.request_id]}
    assert fallbacks.snapshot() == before
    eager = make_core(tiny_gpu_decoder)
    eager._runner._graphs = None
    assert run(eager, requests) == together


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=str)
def test_texts_of_several_formats_are_those_of_each_alone(tiny_gpu_decoder, sampling):
    formats = ("bf16", "qet4", "qet2", "qet4/qet3")
    generator = torch.Generator().manual_seed(4)
    requests = [
        make_request(
            str(index),
            torch.randint(4, 500, (length,), generator=generator).tolist(),
            80,
            width,
            kv_format,
            seed=index,
            **sampling,
        )
        for index, (width, length, kv_format) in enumerate(
            [
                (4, 30, "qet4"),
                (2, 100, "qet4"),
                (8, 63, "bf16"),
                (4, 63, "qet2"),
                (3, 64, "qet4/qet3"),
                (8, 1, "qet4"),
                (2, 5, "bf16"),
            ]
        )
    ]

    def core():
        return make_core(tiny_gpu_decoder, kv_format=formats[0], kv_formats=formats[1:])

    before = fallbacks.snapshot()
    together = run(core(), requests)
    for request in requests:
        assert run(core(), [request]) == {request.request_id: together[request.request_id]}
    assert fallbacks.snapshot() == before
    eager = core()
    eager._runner._graphs = None
    assert run(eager, requests) == together


@pytest.mark.gpu
def test_steps_over_sealed_pages_begin_before_the_last_has_ended(tiny_gpu_decoder):
    core = make_core(tiny_gpu_decoder, kv_format="qet4")
    core.add(make_request("a", list(range(5, 65)), 40))
    began_early = 0
    while core.has_work:
        core.step()
        began_early += core._ahead is not None
        core.check_integrity()
    assert began_early >= 37


def test_random_weights_keep_the_size_of_activations():
    weight = random_weight(Shape(256, 1024), 128, BIT_WIDTHS)
    for width in (2, 3, 4, 6, 8):
        levels = reference.dequantize(weight, width)
        assert 0.5 < levels.std() * 1024**0.5 < 1.6
        assert levels.mean().abs() < 0.1 * levels.std()
