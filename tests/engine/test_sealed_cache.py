"""Sequences whose pages are sealed: the same answer whatever is computed beside them, and near what exact pages give."""

from dataclasses import replace

import pytest
import torch

from anybit.engine.errors import CapacityError
from anybit.engine.kv.key_balance import KeyBalance
from anybit.engine.kv.prompt_heads import read_heads
from anybit.engine.models.native import NativeLayers
from anybit.engine.quantize.run import QuantizeOptions, quantize
from anybit.engine.types import FinishReason
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import DenseLoader, NestedLoader
from anybit.kernels import fallbacks
from anybit.kernels.cpu.bindings import instruction_sets, select_instruction_set, selected_instruction_set
from anybit.kernels.layout import BIT_WIDTHS
from anybit.kvcache.slots import slots_needed
from tests.fixtures.engine import RecordingDecoder, cached_logits, make_cache, make_core, make_request, run
from tests.fixtures.native import native_only
from tests.fixtures.tiny_families import FAMILIES, tiny_family
from tests.fixtures.tiny_llama import decoder_of, save_llama, tiny_llama

NATIVE = ("qet4", "qet3/qet2")
PORTABLE = ("qet4", "qet2+2/uniform4")  # of which the native step does not know one
SHAPES = [(1, 2), (63, 4), (64, 8), (65, 4), (130, 2), (200, 8), (129, 3)]  # prompt length, width
NEW_TOKENS = 6
WHOLE_VECTORS = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    from anybit.engine.quantize.run import QuantizeOptions, quantize
    from anybit.engine.weights.huggingface_source import HuggingFaceSource

    source = HuggingFaceSource(save_llama(tiny_llama(num_hidden_layers=3), tmp_path_factory.mktemp("source")))
    directory = tmp_path_factory.mktemp("checkpoint")
    quantize(source, directory, QuantizeOptions(method="rtn"))
    return decoder_of(source.config, NestedLoader(CheckpointReader(directory), BIT_WIDTHS, 8, "cpu"))


def prompt(length, seed):
    return torch.randint(4, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(*kv_formats):
    return [
        make_request(f"r{index}", prompt(length, index), NEW_TOKENS, width, kv_formats[index % len(kv_formats)])
        for index, (length, width) in enumerate(SHAPES)
    ]


def answers(decoder, asked, **limits):
    """Tokens and logits of each request, all in one engine."""
    recording = RecordingDecoder(decoder)
    tokens = run(make_core(recording, **limits), asked)
    return tokens, recording.logits_of


@pytest.fixture(scope="module", params=[NATIVE, PORTABLE], ids=["native", "portable"])
def formats(request):
    return request.param


@pytest.fixture(scope="module")
def alone(decoder, formats):
    found = [answers(decoder, [one], kv_formats=formats) for one in requests("bf16", *formats)]
    return {k: v for part, _ in found for k, v in part.items()}, {k: v for _, part in found for k, v in part.items()}


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_step_tokens": 7},
        {"max_step_tokens": 64},
        {"max_num_seqs": 2},
        {"num_pages": 6, "max_step_tokens": 100},
    ],
    ids=str,
)
def test_neighbours_chunks_and_preemptions_change_no_logit(decoder, formats, alone, limits):
    tokens, logits = answers(decoder, requests("bf16", *formats), kv_formats=formats, **limits)
    assert tokens == alone[0]
    for name, expected in alone[1].items():
        # Of a preempted sequence some rows come twice.
        assert torch.equal(torch.stack(logits[name])[-len(expected) :], torch.stack(expected))


def test_a_shared_beginning_is_not_computed_again_and_changes_no_logit(decoder):
    beginning = prompt(150, seed=9)
    asked = [make_request(str(index), [*beginning, 7, index + 9], 4, 4, "qet4") for index in range(3)]
    recording = RecordingDecoder(decoder)
    core = make_core(recording, kv_format="qet4")
    shared = {}
    for request in asked:
        shared |= run(core, [request])
    assert core.take_stats().prefix_hit_tokens == 2 * 128
    for request in asked:
        tokens, logits = answers(decoder, [request], kv_format="qet4", prefix_cache=False)
        name = request.request_id
        assert tokens[name] == shared[name]
        assert torch.equal(torch.stack(recording.logits_of[name]), torch.stack(logits[name]))


@native_only
@pytest.mark.parametrize("kv_format", ["qet4", "qet3", "qet2", "qet2+2", "qet2+2@2", "qet4/qet2"])
@pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES)
def test_the_native_step_reads_what_the_portable_layers_do(tmp_path, model, kv_format):
    model_type, overrides = model
    source = HuggingFaceSource(save_llama(tiny_family(model_type, {**overrides, **WHOLE_VECTORS}), tmp_path / "source"))
    (tmp_path / "checkpoint").mkdir()
    quantize(source, tmp_path / "checkpoint", QuantizeOptions(method="rtn"))
    native = decoder_of(source.config, NestedLoader(CheckpointReader(tmp_path / "checkpoint"), (8,), 8, "cpu"))
    assert isinstance(native.native, NativeLayers)
    tokens = prompt(200, seed=8)
    before = fallbacks.snapshot()
    got = cached_logits(native, tokens, 150, 8, kv_format)
    assert fallbacks.snapshot() == before
    expected = cached_logits(replace(native, native=None), tokens, 150, 8, kv_format)
    # Numbers in exact pages are rounded to 8 bits, and now and then to the other side; so is what is sealed.
    assert float((got - expected).norm() / expected.norm()) < 0.05


@native_only
def test_every_instruction_set_gives_the_same_logits(decoder):
    tokens, before = prompt(150, seed=6), selected_instruction_set()
    found = []
    for name in instruction_sets():
        select_instruction_set(name)
        found.append(cached_logits(decoder, tokens, 130, 4, "qet3/qet4"))
    select_instruction_set(before)
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_logits_are_the_nearer_to_those_of_exact_pages_the_more_bits_there_are(decoder):
    tokens = prompt(240, seed=5)
    exact = cached_logits(decoder, tokens, 200, 8, "bf16")
    errors = {}
    for kv_format in ("uniform8", "qet4", "qet2+2", "qet3", "qet2"):
        sealed = cached_logits(decoder, tokens, 200, 8, kv_format)
        # In the first page all are exact, but for rounding in another basis.
        assert float((sealed[:64] - exact[:64]).norm() / exact[:64].norm()) < 3e-2
        errors[kv_format] = float((sealed[64:] - exact[64:]).norm() / exact[64:].norm())
    # A random model's attention is sharp, and so errors grow from layer to layer.
    assert errors["uniform8"] < 0.04
    assert errors["qet4"] < 0.5
    assert errors["uniform8"] < errors["qet4"] < errors["qet3"] < errors["qet2"]
    assert errors["qet2+2"] < errors["qet3"]


def test_a_row_that_is_not_finite_fails_its_own_sequence_alone(tmp_path):
    poison = 499
    model = tiny_llama()
    model.model.embed_tokens.weight.data[poison] = torch.nan
    from anybit.engine.weights.huggingface_source import HuggingFaceSource

    source = HuggingFaceSource(save_llama(model, tmp_path))
    dense = decoder_of(source.config, DenseLoader(source))
    bad = prompt(200, seed=1)
    bad[20] = poison
    core = make_core(dense, kv_format="qet4", max_step_tokens=50)
    good = make_request("good", [token for token in prompt(90, seed=2) if token != poison], 3, 8)
    events = core.add(make_request("bad", bad, 3, 8)) + core.add(good)
    while core.has_work:
        events += core.step()
        core.check_integrity()
    ends = {event.request_id: event.finish_reason for event in events if event.finish_reason is not None}
    assert ends == {"bad": FinishReason.ERROR, "good": FinishReason.LENGTH}


def test_no_page_and_no_slot_outlives_its_sequence(decoder):
    core = make_core(decoder, kv_format="qet4", max_step_tokens=90)
    for request in requests("qet4")[:5]:
        core.add(request)
    core.step()
    core.abort("r3")
    core.check_integrity()
    core.abort_all()
    core.check_integrity()
    stats = core.take_stats()
    assert (stats.kv_pages_used, stats.kv_bytes_used) == (0, {"qet4": 0})


def test_sealed_pages_and_the_time_they_take_are_counted(decoder, formats):
    core = make_core(decoder, kv_formats=formats)
    run(core, requests("bf16", formats[0]))
    stats = core.take_stats()
    # Prompts of 63, 65 and 200 tokens and their answers, of which the last token is not computed on.
    assert stats.sealed_pages == {formats[0]: 1 + 1 + 3}
    assert set(stats.seal_seconds) == set(formats)
    assert stats.seal_seconds[formats[0]] > 0
    assert stats.seal_seconds[formats[1]] == 0


def test_formats_that_are_not_served_are_refused(decoder):
    core = make_core(decoder, kv_format="qet4")
    (event,) = core.add(make_request("a", [5, 6], 2, 4, "qet2"))
    assert event.error == "KV format qet2 is not served."


def test_a_format_without_pages_keeps_no_other_waiting(decoder):
    core = make_core(decoder, kv_format="qet4", kv_formats=("bf16",), num_pages=5, max_step_tokens=500)
    core.add(make_request("first", prompt(180, 1), 40, 4, "qet4"))
    core.add(make_request("waits", prompt(180, 2), 2, 4, "qet4"))
    core.add(make_request("other", prompt(20, 3), 2, 4, "bf16"))
    ended = [event.request_id for _ in range(4) for event in core.step() if event.finish_reason is not None]
    assert ended == ["other"]
    core.abort_all()


def test_slots_cover_a_step_wherever_it_begins():
    for seqs, tokens in [(1, 1), (1, 256), (8, 7), (4, 64)]:
        for offset in range(0, 64, 7):
            share = tokens // seqs
            pages = sum((offset + share + 1 - 1) // 64 + 1 for _ in range(seqs))
            assert pages <= slots_needed(seqs, tokens)


def test_balance_weights_are_estimated_from_a_text(decoder):
    balance = KeyBalance()
    balance.add(read_heads(decoder, prompt(200, seed=3), 8))
    weights = balance.weights()
    assert len(weights) == 3
    for weight in weights:
        assert weight.shape == (2, 16)
        assert torch.allclose(weight.log().mean(1), torch.zeros(2), atol=1e-5)
    with pytest.raises(ValueError, match="page of 64 tokens"):
        balance.add(read_heads(decoder, prompt(20, seed=3), 8))


def test_a_cache_of_two_exact_formats_has_one_pool(decoder):
    books, pool = make_cache(decoder, 4, ("bf16", "qet4"), 3)
    assert (pool.num_pages, pool.sealed["qet4"].num_pages) == (7, 4)
    assert books.slots.allocate(3) == [4, 5, 6]
    with pytest.raises(RuntimeError, match="1 slots were asked for and 0 are free"):
        books.slots.allocate(1)


def test_capacity_counts_the_page_of_exact_tokens(decoder):
    core = make_core(decoder, kv_format="qet4", num_pages=3)
    assert core.add(make_request("fits", prompt(100, 1), 29, 4)) == []
    (event,) = core.add(make_request("large", prompt(100, 1), 30, 4))
    assert event.error is not None
    assert "needs 4 pages" in event.error
    assert issubclass(CapacityError, Exception)
