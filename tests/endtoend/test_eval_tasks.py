"""Questions and text scored offline and through a server of the same checkpoint: the same numbers."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from anybit.engine.evaluate.choices import score_questions
from anybit.engine.evaluate.questions import builtin_questions, tokenize_question
from anybit.engine.evaluate.variant import Variant
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import NestedLoader
from anybit.server.bench.client import http_client
from anybit.server.scoring.client import ScoringClient
from anybit.server.scoring.run import choice_log_probabilities
from tests.endtoend.command import ServeCommand, run_anybit
from tests.fixtures.tiny_llama import decoder_of

WIDTHS = (2, 3, 4, 6, 8)


def report_of(*arguments: str | Path, cache: Path, out: Path) -> dict[str, Any]:
    result = run_anybit("eval", *arguments, "--json", out, cache=cache)
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(out.read_text())
    return report | {"printed": result.stdout}


def test_log_probabilities_of_choices_are_those_of_the_server(tiny_server: ServeCommand, tiny_checkpoint: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    decoder = decoder_of(config, NestedLoader(CheckpointReader(tiny_checkpoint), WIDTHS, 8))
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    questions = [
        tokenize_question(question, [tokenizer.encode(text).ids for text in question.texts], (), 512)
        for question in builtin_questions()[:12]
    ]
    assert any(len(choice) > 1 for question in questions for choice in question.choices)
    variants = [Variant(str(width), decoder, width, "bf16", 0.0) for width in WIDTHS]
    offline = score_questions(variants, questions)

    async def through_server(width: int) -> list[list[float]]:
        async with http_client(tiny_server.url, None) as http:
            return await choice_log_probabilities(
                ScoringClient(http, f"{tiny_server.url}/v1", "tiny"), questions, width
            )

    for width, expected in zip(WIDTHS, offline, strict=True):
        for got, wanted in zip(asyncio.run(through_server(width)), expected, strict=True):
            assert got == pytest.approx(wanted, abs=1e-4)
    assert offline[0] != offline[-1]


def test_both_ways_report_the_same(
    tiny_server: ServeCommand, tiny_checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    what = ("--tasks", "builtin", "--text", "builtin", "--context", "128", "--max-tokens", "512")
    offline = report_of(tiny_checkpoint, *what, "--threads", "1", cache=cache, out=tmp_path / "offline.json")
    served = report_of("--base-url", tiny_server.url, *what, cache=cache, out=tmp_path / "served.json")
    assert [row["bit_width"] for row in offline["tasks"]] == ["float", *WIDTHS]
    nested = [row for row in offline["tasks"] if row["scheme"] == "nested"]
    for direct, row in zip(nested, served["tasks"], strict=True):
        assert {**direct, "scheme": "served"} == row
    assert served["tokens"] == offline["tokens"] == 4 * 127
    nested = [row for row in offline["results"] if row["scheme"] == "nested"]
    for direct, row in zip(nested, served["results"], strict=True):
        assert row["bit_width"] == direct["bit_width"]
        assert row["effective_bits"] == pytest.approx(direct["effective_bits"], abs=1e-4)
        assert row["perplexity"] == pytest.approx(direct["perplexity"], rel=1e-4)
    for printed in (offline["printed"], served["printed"]):
        assert "general_knowledge: 40 questions" in printed
        assert "alice_in_wonderland.txt: 508 tokens" in printed


def test_tasks_alone_leave_the_text_out(tiny_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"context": "Hello", "choices": ["world", "there"], "answer": 0, "task": "greeting"}\n')
    report = report_of(
        tiny_checkpoint,
        "--tasks",
        quiz,
        "--bit-width",
        "4",
        "--threads",
        "1",
        cache=cache,
        out=tmp_path / "report.json",
    )
    assert (report["text"], report["results"]) == (None, [])
    assert [(row["task"], row["bit_width"], row["questions"]) for row in report["tasks"]] == [
        ("greeting", "float", 1),
        ("greeting", 4, 1),
    ]
    assert "perplexity" not in report["printed"]


def test_wrong_question_is_one_sentence(tiny_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"question": "Hello", "choices": ["world"], "answer": 0}\n')
    result = run_anybit("eval", tiny_checkpoint, "--tasks", quiz, cache=cache)
    assert result.returncode == 1
    assert f"Line 1 of {quiz} is not a question: its choices must be a list of 2 to 64 texts." in result.stderr
