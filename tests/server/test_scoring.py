"""Evaluation through a server: what it is asked, what its answers are worth, and what is said of one that cannot score."""

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from anybit.engine.errors import SourceError
from anybit.engine.evaluate.questions import Question, builtin_questions
from anybit.server.bench.target import TargetError
from anybit.server.cli import app
from anybit.server.scoring.run import ScoringOptions, evaluate_server
from tests.fixtures.sentences import assert_one_sentence
from tests.server.fake_engine import WIDTHS, FakeEngine
from tests.server.foreign_server import ForeignServer, Reply, Script, whole
from tests.server.live_server import LiveServer
from tests.server.tiny_checkpoint import byte_level_tokenizer, write_checkpoint
from tests.waiting import wait_until

QUESTIONS = tuple(builtin_questions()[:5])
OPTIONS = ScoringOptions(perplexity=False, questions=QUESTIONS, context=50, max_tokens=200)


def evaluate(server: LiveServer, options: ScoringOptions = OPTIONS, key: str | None = None) -> dict[str, Any]:
    return asyncio.run(evaluate_server(f"{server.url}/v1", key, None, options))


def fake_sums(tokenizer: Tokenizer, question: Question) -> list[float]:
    """What the fake engine gives each choice: every token has -1 - its id."""
    context, *texts = (tokenizer.encode(text).ids for text in question.texts)
    return [sum(-1.0 - token for token in ids[len(context) :]) for ids in texts]


def test_every_width_answers_the_questions(server: LiveServer, tokenizer: Tokenizer) -> None:
    seen: list[tuple[str, int, int]] = []
    report = asyncio.run(
        evaluate_server(f"{server.url}/v1", None, None, OPTIONS, lambda *progress: seen.append(progress))
    )
    assert (report["model"], report["text"], report["tokens"], report["results"]) == ("tiny", None, 0, [])
    assert (report["machine"], report["server"]["default_bit_width"]) == ("cpu", 4)
    sums = [fake_sums(tokenizer, question) for question in QUESTIONS]
    right = [values.index(max(values)) == question.answer for values, question in zip(sums, QUESTIONS, strict=True)]
    assert [row["bit_width"] for row in report["tasks"]] == list(WIDTHS)
    for row in report["tasks"]:
        assert (row["task"], row["questions"], row["scheme"]) == ("general_knowledge", 5, "served")
        assert row["kv_format"] == "bf16"
        assert row["accuracy"] == sum(right) / 5
    assert seen == [("tasks", number, 5 * len(WIDTHS)) for number in range(1, 5 * len(WIDTHS) + 1)]


def test_each_width_is_asked_for_and_nothing_is_generated(start: Callable[..., LiveServer]) -> None:
    engine = FakeEngine()
    evaluate(start(engine), replace(OPTIONS, bit_width="2,8"))
    assert {request.precision.bit_width for request in engine.requests} == {2, 8}
    assert {request.sampling.max_tokens for request in engine.requests} == {0}
    assert len(engine.requests) == 2 * 4 * 5


def test_perplexity_is_over_windows_of_the_text(server: LiveServer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("Hello there, how are you today? " * 40)
    options = replace(OPTIONS, text=path, perplexity=True, questions=(), bit_width="3")
    report = evaluate(server, options)
    ids = tokenizer.encode(path.read_text()).ids
    windows = [ids[start : start + 50] for start in range(0, min(200, len(ids)) - 49, 50)]
    costs = [1 + token for window in windows for _, token in pairwise(window)]
    (row,) = report["results"]
    assert (report["text"], report["tokens"], report["tasks"]) == ("own.txt", len(costs), [])
    assert row["perplexity"] == pytest.approx(math.exp(min(sum(costs) / len(costs), 700)), rel=1e-9)
    assert (row["bit_width"], row["effective_bits"], row["kl"], row["top1_agreement"]) == (3, 3.25, None, None)


def test_texts_begin_with_what_the_tokenizer_puts_before_them(start: Callable[..., LiveServer], tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    start_id = tokenizer.token_to_id("<|im_start|>")
    tokenizer.post_processor = TemplateProcessing(
        single=["<|im_start|>", "$A", "<|im_end|>"],
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<|im_start|>", "<|im_end|>")],
    )
    engine = FakeEngine()
    server = start(engine, checkpoint=write_checkpoint(tmp_path / "checkpoint", tokenizer))
    evaluate(server, replace(OPTIONS, perplexity=True, bit_width="4"))
    assert {request.prompt_token_ids[0] for request in engine.requests} == {start_id}
    assert all(start_id not in request.prompt_token_ids[1:] for request in engine.requests)


def test_the_key_is_sent(start: Callable[..., LiveServer]) -> None:
    server = start(api_keys=("sesame",))
    assert evaluate(server, key="sesame")["tasks"]
    with pytest.raises(TargetError, match="--api-key"):
        evaluate(server, key="other")


def test_a_width_that_is_not_served_is_refused(server: LiveServer) -> None:
    with pytest.raises(TargetError, match="does not list the bit-width 6"):
        evaluate(server, replace(OPTIONS, bit_width="4,6"))


def test_a_question_beyond_the_servers_context_is_refused(server: LiveServer) -> None:
    long = replace(QUESTIONS[0], place="Line 3 of quiz.jsonl", text="x" * 400)
    with pytest.raises(SourceError) as caught:
        evaluate(server, replace(OPTIONS, questions=(long,)))
    assert_one_sentence(caught.value, "Line 3 of quiz.jsonl", "the context holds 256")


def refusals(server: LiveServer) -> float:
    return server.metric("anybit_rejections_total", reason="queue_full") or 0


def test_a_full_queue_is_waited_for(start: Callable[..., LiveServer]) -> None:
    """Four questions at a time of four choices each, where five sequences may wait: nothing ends before one is refused."""
    engine = FakeEngine(hold=True)
    server = start(engine, max_queued_requests=5)
    with ThreadPoolExecutor(1) as executor:
        report = executor.submit(evaluate, server, replace(OPTIONS, bit_width="4"))
        try:
            wait_until(lambda: refusals(server) > 0, "nothing was refused")
        finally:
            engine.hold = False
        assert report.result(timeout=60)["tasks"][0]["questions"] == 5


def foreign(
    tokenize: Callable[[dict[str, Any]], bytes] | None = None,
    complete: Callable[[dict[str, Any]], bytes] | None = None,
) -> Script:
    """Tokens are characters; scores are halves of the tokens' place."""

    def tokens(body: dict[str, Any]) -> bytes:
        ids = [ord(character) for character in body["prompt"]]
        return whole(200, {"tokens": ids, "count": len(ids), "max_model_len": 4096})

    def scores(body: dict[str, Any]) -> bytes:
        return whole(200, {"choices": [choice(index, prompt) for index, prompt in enumerate(body["prompt"])]})

    async def script(body: dict[str, Any]) -> Reply:
        if "add_special_tokens" in body:
            yield (tokenize or tokens)(body)
        else:
            yield (complete or scores)(body)

    return script


def choice(index: int, prompt: Sequence[int], left_out: int = 0) -> dict[str, Any]:
    values = [None, *(-place / 2 for place in range(1, len(prompt)))]
    return {"index": index, "text": "", "logprobs": {"token_logprobs": values[left_out:]}}


def ask(script: Script, options: ScoringOptions = OPTIONS) -> tuple[dict[str, Any], ForeignServer]:
    async def run() -> tuple[dict[str, Any], ForeignServer]:
        async with ForeignServer(script) as server:
            return await evaluate_server(f"{server.url}/v1", None, None, options), server

    return asyncio.run(run())


def test_another_server_that_scores_prompts_gets_one_row() -> None:
    report, server = ask(foreign(), replace(OPTIONS, perplexity=True))
    assert (report["model"], report["server"], report["machine"]) == ("their-model", None, None)
    (row,), (task,) = report["results"], report["tasks"]
    assert row["bit_width"] is task["bit_width"] is row["effective_bits"] is None
    assert row["perplexity"] == pytest.approx(math.exp(sum(place / 2 for place in range(1, 50)) / 49))
    # The longer a choice, the less likely, so the shortest is taken.
    shortest = [min(range(4), key=lambda i: len(question.choices[i])) for question in QUESTIONS]
    right = [place == question.answer for place, question in zip(shortest, QUESTIONS, strict=True)]
    assert task["accuracy"] == sum(right) / 5
    asked = next(body for body in server.bodies if "echo" in body)
    fields = {"model": "their-model", "max_tokens": 0, "echo": True, "logprobs": 0}
    assert fields.items() <= asked.items()
    assert "bit_width" not in asked


def _no_logprobs(body: dict[str, Any]) -> bytes:
    return whole(200, {"choices": [{"index": index, "text": ""} for index in range(len(body["prompt"]))]})


def _too_few(body: dict[str, Any]) -> bytes:
    return whole(200, {"choices": [choice(index, prompt, 2) for index, prompt in enumerate(body["prompt"])]})


@pytest.mark.parametrize(
    ("script", "telling"),
    [
        (foreign(tokenize=lambda body: whole(404, {"error": {"message": "no such route."}})), "404: no such route."),
        (foreign(tokenize=lambda body: whole(200, {"ids": [1]})), "another shape"),
        (foreign(complete=lambda body: whole(400, {"error": {"message": "echo is unknown"}})), "400: echo is unknown."),
        (foreign(complete=lambda body: whole(200, b"<html>")), "another shape"),
        (foreign(complete=_no_logprobs), "does not score the tokens of a prompt"),
        (foreign(complete=_too_few), "does not score the tokens of a prompt"),
        (foreign(complete=lambda body: whole(200, {"choices": []})), "does not score the tokens of a prompt"),
    ],
)
def test_a_server_that_cannot_score_is_told_in_one_sentence(script: Script, telling: str) -> None:
    with pytest.raises(TargetError) as caught:
        ask(script)
    assert_one_sentence(caught.value, telling)


def test_an_answer_at_another_width_is_refused(start: Callable[..., LiveServer], monkeypatch: Any) -> None:
    from anybit.server.scoring import client

    def answer(*_: Any, **__: Any) -> Any:
        return client._Completion([], client._Usage(bit_width=2))

    async def run() -> None:
        scoring = client.ScoringClient(None, "http://host/v1", "m")  # type: ignore[arg-type]
        monkeypatch.setattr(client.ScoringClient, "_post", lambda *_: asyncio.sleep(0, answer()))
        await scoring.score([[1, 2]], 4)

    with pytest.raises(TargetError, match="at 2 bits instead of 4"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (("--base-url", "127.0.0.1:8000"), "not the address of a server"),
        (("--base-url", "http://host", "--api-key", "schlüssel"), "characters that no key has"),
        (("--base-url", "http://host", "--device", "cpu"), "--device"),
        (("--base-url", "http://host", "--baseline", "matquant-slice"), "--baseline"),
        (("--base-url", "http://host", "--lm-head-bits", "8"), "--lm-head-bits"),
        (("--api-key", "sesame"), "--base-url"),
        (("--bit-width", "5"), "not a list of bit-widths"),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...], telling: str) -> None:
    result = CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert telling in result.output
    assert "Traceback" not in result.output


def test_wrong_questions_are_told_before_anything_is_loaded_or_asked(tmp_path: Path) -> None:
    path = tmp_path / "quiz.jsonl"
    path.write_text('{"question": "x"}\n')
    for arguments in (["/nowhere/model"], ["--base-url", "http://127.0.0.1:1"]):
        result = CliRunner().invoke(app, ["eval", *arguments, "--tasks", str(path)])
        assert isinstance(result.exception, SourceError)
        assert_one_sentence(result.exception, "Line 1 of ")
