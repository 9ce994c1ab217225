"""Perplexity, KL and agreement against direct computations with Transformers."""

import math
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from anybit.engine.config import ConfigError
from anybit.engine.errors import SourceError
from anybit.engine.evaluate import perplexity
from anybit.engine.evaluate.matquant_slice import MatQuantSliceLoader, sliced_weight
from anybit.engine.evaluate.options import EvalOptions
from anybit.engine.evaluate.perplexity import score_windows
from anybit.engine.evaluate.report import evaluate_checkpoint, quick_perplexity
from anybit.engine.evaluate.text import builtin_text, windows
from anybit.engine.evaluate.variant import Variant
from anybit.engine.text_prefix import first_tokens
from anybit.engine.weights.accounting import effective_bits, linear_entries
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import DenseLoader
from anybit.engine.weights.manifest import read_manifest
from tests.fixtures.sentences import assert_one_sentence
from tests.fixtures.tiny_llama import decoder_of, dense_decoder, save_llama, tiny_llama
from tests.server.tiny_checkpoint import byte_level_tokenizer

CONTEXT = 70
WINDOWS = torch.randint(512, (3, CONTEXT), generator=torch.Generator().manual_seed(0)).tolist()
OPTIONS = EvalOptions(context=CONTEXT, max_tokens=3 * CONTEXT, device="cpu", threads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two Transformers models, and variants over the same files in full precision."""
    pairs = {}
    for seed in (0, 1):
        model = tiny_llama(seed)
        directory = save_llama(model, tmp_path_factory.mktemp("llama"))
        pairs[f"model {seed}"] = model, dense_decoder(directory)
    return pairs


def variant(models, name):
    return Variant(name, models[name][1], 8, "float32", 32.0, "float")


def log_probabilities(models, name):
    with torch.inference_mode():
        return torch.log_softmax(models[name][0](torch.tensor(WINDOWS)).logits.double(), -1)[:, :-1]


@pytest.mark.parametrize(
    ("context", "max_tokens", "expected"),
    [
        (3, None, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        (3, 7, [[0, 1, 2], [3, 4, 5]]),
        (3, 6, [[0, 1, 2], [3, 4, 5]]),
        (5, 100, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
        (10, None, [list(range(10))]),
    ],
)
def test_windows_are_whole_and_do_not_overlap(context, max_tokens, expected):
    assert windows(range(10), context, max_tokens) == expected


def test_windows_begin_with_what_every_text_begins_with():
    assert windows(range(10), 4, None, [99]) == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert windows(range(10), 11, None, [99]) == [[99, *range(10)]]
    with pytest.raises(SourceError):
        windows(range(10), 1, None, [99])


@pytest.mark.parametrize("ends", [["<s>", "$A"], ["<s>", "$A", "</s>"], ["$A"]])
def test_first_tokens_are_those_the_tokenizer_puts_before_a_text(ends):
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ids = [(text, tokenizer.token_to_id(text)) for text in ("<s>", "</s>")]
    tokenizer.post_processor = TemplateProcessing(single=ends, special_tokens=ids)
    assert first_tokens(tokenizer) == [token_id for text, token_id in ids if text == "<s>" and text in ends]


@pytest.mark.parametrize(("context", "max_tokens", "found"), [(11, None, 10), (4, 3, 3)])
def test_text_shorter_than_a_window_is_refused(context, max_tokens, found):
    with pytest.raises(SourceError) as caught:
        windows(range(10), context, max_tokens)
    assert_one_sentence(caught.value, f"{found} tokens", str(context))


@pytest.mark.parametrize("chunk", [16, 256])
def test_perplexity_is_that_of_transformers(models, monkeypatch, chunk):
    monkeypatch.setattr(perplexity, "_CHUNK", chunk)
    scored = variant(models, "model 0")
    score_windows([scored], WINDOWS)
    targets = torch.tensor(WINDOWS)[:, 1:, None]
    nll = -log_probabilities(models, "model 0").gather(2, targets).sum()
    assert scored.tokens == 3 * (CONTEXT - 1)
    assert scored.nll == pytest.approx(float(nll), rel=1e-6)
    assert scored.perplexity == pytest.approx(math.exp(float(nll) / scored.tokens), rel=1e-6)


def test_kl_and_agreement_are_those_of_transformers(models):
    reference, scored = variant(models, "model 0"), variant(models, "model 1")
    score_windows([scored], WINDOWS, reference)
    wanted, got = log_probabilities(models, "model 0"), log_probabilities(models, "model 1")
    assert scored.kl == pytest.approx(float((wanted.exp() * (wanted - got)).sum()), rel=1e-5)
    assert scored.agreements == int((wanted.argmax(-1) == got.argmax(-1)).sum())


@pytest.mark.parametrize("same_object", [True, False])
def test_kl_of_a_model_to_itself_is_zero(models, same_object):
    reference = variant(models, "model 0")
    scored = reference if same_object else replace(reference)
    score_windows([scored], WINDOWS, reference)
    assert scored.kl == pytest.approx(0, abs=1e-6)
    assert scored.agreements == scored.tokens == 3 * (CONTEXT - 1)
    if same_object:
        assert scored.kl == 0


def test_progress_counts_windows_times_models(models):
    seen = []
    score_windows(
        [variant(models, "model 1")], WINDOWS, variant(models, "model 0"), lambda *counts: seen.append(counts)
    )
    assert seen == [(2, 6), (4, 6), (6, 6)]


def test_perplexity_of_a_hopeless_model_is_finite():
    scored = Variant("hopeless", None, 2, "bf16", 2.0, tokens=1, nll=1e9)
    assert math.isfinite(scored.perplexity)


def test_report_of_a_checkpoint_compares_every_width_with_the_float_model(tiny_source, tiny_checkpoint):
    report = evaluate_checkpoint(tiny_checkpoint, HuggingFaceSource(tiny_source), OPTIONS)
    rows = {row["bit_width"]: row for row in report["results"]}
    assert list(rows) == ["float", 2, 3, 4, 6, 8]
    assert report["tokens"] == 3 * (CONTEXT - 1)
    assert (report["method"], report["group_size"], report["context"]) == ("rtn", "auto", CONTEXT)
    assert (rows["float"]["kl"], rows["float"]["top1_agreement"]) == (0, 1)
    entries = linear_entries(read_manifest(tiny_checkpoint))
    for width in (2, 3, 4, 6, 8):
        assert rows[width]["effective_bits"] == pytest.approx(effective_bits(entries, width), abs=1e-4)
    falling = [rows[width]["kl"] for width in (2, 4, 6, 8)]
    assert falling == sorted(falling, reverse=True)
    assert rows[8]["kl"] < 0.01
    assert rows[8]["perplexity"] == pytest.approx(rows["float"]["perplexity"], rel=0.02)


def test_report_without_a_source_has_no_comparison(tiny_checkpoint):
    report = evaluate_checkpoint(tiny_checkpoint, None, replace(OPTIONS, bit_widths=(3,)))
    (row,) = report["results"]
    assert (row["bit_width"], row["kl"], row["top1_agreement"]) == (3, None, None)


def test_baseline_is_the_published_slice_and_counts_the_bit_it_rounds_with(tiny_source, tiny_checkpoint):
    source = HuggingFaceSource(tiny_source)
    options = replace(OPTIONS, bit_widths=(2, 8), baselines=("matquant-slice",))
    rows = evaluate_checkpoint(tiny_checkpoint, source, options)["results"]
    assert [(row["bit_width"], row["scheme"]) for row in rows] == [
        ("float", "float"),
        (2, "nested"),
        (8, "nested"),
        (2, "matquant-slice"),
        (8, "matquant-slice"),
    ]
    entries = linear_entries(read_manifest(tiny_checkpoint))
    counts = [entry.shape[0] * entry.shape[1] for entry in entries]
    floats = sum(32 * count / entry.group_size for count, entry in zip(counts, entries, strict=True)) / sum(counts)
    assert [row["effective_bits"] for row in rows[3:]] == pytest.approx([3 + floats, 8 + floats], abs=1e-4)
    decoder = decoder_of(source.config, MatQuantSliceLoader(DenseLoader(source), None, 2, 8))
    up = source.tensor("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(decoder.layers[0].mlp.down.weight, sliced_weight(up, 32, 2))
    assert rows[3]["kl"] > rows[4]["kl"]


def test_baseline_needs_the_source(tiny_checkpoint):
    with pytest.raises(SourceError) as caught:
        evaluate_checkpoint(tiny_checkpoint, None, replace(OPTIONS, baselines=("matquant-slice",)))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"bit_widths": (4, 5)}, ConfigError, "not for 5"),
        ({"baselines": ("gptq",)}, ConfigError, "'gptq'"),
        ({"context": 10**6, "max_tokens": None}, SourceError, "--context"),
    ],
)
def test_options_that_cannot_be_met_are_refused(tiny_source, tiny_checkpoint, changes, error, named):
    with pytest.raises(error) as caught:
        evaluate_checkpoint(tiny_checkpoint, HuggingFaceSource(tiny_source), replace(OPTIONS, **changes))
    assert_one_sentence(caught.value, named)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfa"])
def test_text_that_cannot_be_read_is_refused(tiny_checkpoint, tmp_path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        evaluate_checkpoint(tiny_checkpoint, None, replace(OPTIONS, text=path))
    assert_one_sentence(caught.value, "text.txt", "UTF-8")


def test_own_text_is_scored(tiny_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(builtin_text()[:2000])
    own = evaluate_checkpoint(tiny_checkpoint, None, replace(OPTIONS, text=tmp_path / "text.txt", bit_widths=(4,)))
    shipped = evaluate_checkpoint(tiny_checkpoint, None, replace(OPTIONS, bit_widths=(4,)))
    assert own["text"] == "text.txt"
    assert own["results"][0]["perplexity"] == shipped["results"][0]["perplexity"]


def test_quick_perplexity_measures_float_and_every_width(tiny_source, tiny_checkpoint):
    measured, text = quick_perplexity(tiny_checkpoint, HuggingFaceSource(tiny_source), lambda done, total: None)
    assert list(measured) == ["float", "2", "3", "4", "6", "8"]
    assert text == "alice_in_wonderland.txt, first 512 tokens"
    assert all(value > 1 for value in measured.values())
