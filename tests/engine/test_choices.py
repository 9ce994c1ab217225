"""Log probabilities of choices against direct computations with Transformers."""

from dataclasses import replace

import pytest
import torch

from anybit.engine.errors import SourceError
from anybit.engine.evaluate import choices
from anybit.engine.evaluate.choices import score_questions
from anybit.engine.evaluate.options import EvalOptions
from anybit.engine.evaluate.questions import Question, TokenQuestion, builtin_questions
from anybit.engine.evaluate.report import evaluate_checkpoint
from anybit.engine.evaluate.variant import Variant
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from tests.fixtures.sentences import assert_one_sentence
from tests.fixtures.tiny_llama import dense_decoder, save_llama, tiny_llama

OPTIONS = EvalOptions(
    perplexity=False, questions=tuple(builtin_questions()[:6]), context=70, max_tokens=210, device="cpu", threads=1
)


def random_questions(lengths):
    """For every (context length, choice lengths) a question of random tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count):
        return tuple(torch.randint(512, (count,), generator=generator).tolist())

    return [
        TokenQuestion(
            Question("", "", "x", tuple("abc"[: len(of_choices)]), 0), tokens(context), tuple(map(tokens, of_choices))
        )
        for context, of_choices in lengths
    ]


# One token, more, none shared; contexts that end at, before and after the end of a page of 64, longest first or last.
QUESTIONS = random_questions(
    [(1, (1, 1)), (5, (1, 3, 2)), (64, (70, 1)), (63, (2, 5)), (65, (1, 64)), (200, (9, 1, 30)), (7, (2, 2))]
)


def direct(model, question):
    sums = []
    for sequence in question.sequences:
        with torch.inference_mode():
            log_probs = torch.log_softmax(model(torch.tensor([sequence])).logits[0].double(), -1)
        places = range(len(question.context), len(sequence))
        sums.append(sum(float(log_probs[place - 1, sequence[place]]) for place in places))
    return sums


@pytest.mark.parametrize("chunk", [16, 256])
def test_choices_are_scored_as_by_transformers(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(choices, "_CHUNK", chunk)
    models = [tiny_llama(seed) for seed in (0, 1)]
    variants = [
        Variant(str(seed), dense_decoder(save_llama(model, tmp_path / str(seed))), 8, "float32", 32.0, "float")
        for seed, model in enumerate(models)
    ]
    seen = []
    scores = score_questions(variants, QUESTIONS, lambda *counts: seen.append(counts))
    for model, scored in zip(models, scores, strict=True):
        for question, values in zip(QUESTIONS, scored, strict=True):
            assert values == pytest.approx(direct(model, question), abs=2e-4)
    assert seen == [(2 * number, 2 * len(QUESTIONS)) for number in range(1, len(QUESTIONS) + 1)]
    assert all(variant.pool is None for variant in variants)


def test_a_question_is_scored_alike_after_any_other(tmp_path):
    variant = Variant("", dense_decoder(save_llama(tiny_llama(), tmp_path)), 8, "bf16", 32.0, "float")
    together = score_questions([variant], QUESTIONS)[0]
    assert together == [score_questions([variant], [question])[0][0] for question in QUESTIONS]


def test_report_has_tasks_of_the_float_model_every_width_and_baselines(tiny_source, tiny_checkpoint):
    source = HuggingFaceSource(tiny_source)
    questions = (replace(OPTIONS.questions[0], task="other"), *OPTIONS.questions[1:])
    options = replace(OPTIONS, questions=questions, baselines=("matquant-slice",), bit_widths=(2, 8))
    stages = set()
    report = evaluate_checkpoint(tiny_checkpoint, source, options, lambda stage, done, total: stages.add(stage))
    assert (report["text"], report["tokens"], report["results"], stages) == (None, 0, [], {"tasks"})
    rows = [(row["task"], row["bit_width"], row["scheme"], row["questions"]) for row in report["tasks"]]
    schemes = [("float", "float"), (2, "nested"), (8, "nested"), (2, "matquant-slice"), (8, "matquant-slice")]
    assert rows == [
        (task, *scheme, count) for scheme in schemes for task, count in (("other", 1), ("general_knowledge", 5))
    ]
    assert report["tasks"][0]["accuracy_stderr"] is None
    assert all(0 <= row["accuracy"] <= 1 and 0 <= row["acc_norm"] <= 1 for row in report["tasks"])


def test_text_and_tasks_are_scored_together(tiny_checkpoint):
    report = evaluate_checkpoint(tiny_checkpoint, None, replace(OPTIONS, perplexity=True, bit_widths=(4,)))
    (row,), (task,) = report["results"], report["tasks"]
    assert report["tokens"] == 3 * 69
    alone = evaluate_checkpoint(tiny_checkpoint, None, replace(OPTIONS, bit_widths=(4,)))
    assert alone["tasks"] == [task]
    alone = evaluate_checkpoint(tiny_checkpoint, None, replace(OPTIONS, perplexity=True, questions=(), bit_widths=(4,)))
    assert alone["tasks"] == []
    assert alone["results"][0]["perplexity"] == row["perplexity"]


def test_a_question_longer_than_the_models_context_is_refused(tiny_checkpoint):
    long = replace(OPTIONS.questions[0], place="Line 7 of quiz.jsonl", text="word " * 600)
    with pytest.raises(SourceError) as caught:
        evaluate_checkpoint(tiny_checkpoint, None, replace(OPTIONS, questions=(long,)))
    assert_one_sentence(caught.value, "Line 7 of quiz.jsonl", "the context holds 512")
