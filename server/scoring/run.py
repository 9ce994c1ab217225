"""The report of an evaluation through a server: each width on the same text and questions."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from anybit.engine.evaluate.accuracy import score_tasks
from anybit.engine.evaluate.questions import Question, TokenQuestion, tokenize_question
from anybit.engine.evaluate.text import BUILTIN_TEXT, builtin_text, read_text, windows
from anybit.server.bench.client import http_client
from anybit.server.bench.target import Target, find_target
from anybit.server.scoring.client import ScoringClient

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); a stage is "evaluate" for the text or "tasks" for the questions."""
_REQUESTS_AT_ONCE = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """`text` None is the text that ships with the package, which `perplexity` False leaves unread; `bit_width` as
    Target.choose reads it."""

    text: Path | None = None
    perplexity: bool = True
    questions: tuple[Question, ...] = ()
    context: int = 1024
    max_tokens: int | None = None
    bit_width: str = "all"


async def evaluate_server(
    base_url: str,
    api_key: str | None,
    model: str | None,
    options: ScoringOptions,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The `eval` report of CONTRACT for what a server serves; without the float model there is no KL and no agreement.

    Raises TargetError for a server that does not answer or cannot score, SourceError for a text or question that cannot
    be scored.
    """
    async with http_client(base_url, api_key) as http:
        target = await find_target(http, base_url, model)
        widths = target.choose(options.bit_width)
        client = ScoringClient(http, base_url, target.model)
        first = await _first_tokens(client)
        token_windows: list[list[int]] = []
        if options.perplexity:
            text = builtin_text() if options.text is None else read_text(options.text)
            token_windows = windows((await client.tokenize(text))[0], options.context, options.max_tokens, first)
        questions = await _map(lambda question: _tokenize(client, question, first), options.questions)
        rows, tasks = [], []
        for number, width in enumerate(widths):
            label = _label(target, width)
            if token_windows:
                step = _counter(progress, "evaluate", number, len(widths), len(token_windows))
                rows.append({**label, **await _perplexity(client, token_windows, width, target, step)})
            if questions:
                step = _counter(progress, "tasks", number, len(widths), len(questions))
                scores = await choice_log_probabilities(client, questions, width, step)
                tasks += [{**label, **score.to_json()} for score in score_tasks(options.questions, scores)]
    return {
        "model": target.model,
        "base_url": base_url,
        "server": target.version,
        "text": None if not options.perplexity else BUILTIN_TEXT if options.text is None else options.text.name,
        "tokens": sum(len(window) - 1 for window in token_windows),
        "context": options.context,
        "machine": _told(target, "device"),
        "results": rows,
        "tasks": tasks,
    }


async def choice_log_probabilities(
    client: ScoringClient,
    questions: Iterable[TokenQuestion],
    bit_width: int | None,
    done: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """By question and choice: the sum of the log probabilities of the choice's tokens after the context."""

    async def score(question: TokenQuestion) -> list[float]:
        values = await client.score(question.sequences, bit_width)
        done()
        return [sum(of_choice[len(question.context) - 1 :]) for of_choice in values]

    return await _map(score, questions)


async def _perplexity(
    client: ScoringClient, token_windows: list[list[int]], width: int | None, target: Target, done: Callable[[], None]
) -> dict[str, Any]:
    started = time.perf_counter()

    async def score(window: list[int]) -> float:
        ((values),) = await client.score([window], width)
        done()
        return math.fsum(values)

    total = math.fsum(await _map(score, token_windows))
    return {
        "effective_bits": None if width is None else target.effective_bits.get(width),
        "perplexity": math.exp(min(-total / sum(len(window) - 1 for window in token_windows), 700.0)),
        "kl": None,
        "top1_agreement": None,
        "seconds": round(time.perf_counter() - started, 2),
    }


async def _first_tokens(client: ScoringClient) -> list[int]:
    """What the tokenizer puts before every text: a BOS without which some models predict poorly, or nothing."""
    marked, _ = await client.tokenize("a", special=True)
    plain, _ = await client.tokenize("a")
    starts = range(len(marked) - len(plain) + 1)
    return marked[: next((start for start in starts if marked[start : start + len(plain)] == plain), 0)]


async def _tokenize(client: ScoringClient, question: Question, first: list[int]) -> TokenQuestion:
    answers = [await client.tokenize(text) for text in question.texts]
    limit = min(max_model_len for _, max_model_len in answers)
    return tokenize_question(question, [token_ids for token_ids, _ in answers], first, limit)


async def _map(work: Callable[[Item], Awaitable[Result]], items: Iterable[Item]) -> list[Result]:
    """The results in the order of the items, a few at work at a time; the first failure ends all."""
    places = asyncio.Semaphore(_REQUESTS_AT_ONCE)

    async def one(item: Item) -> Result:
        async with places:
            return await work(item)

    tasks = [asyncio.create_task(one(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _counter(progress: Progress, stage: str, number: int, num_widths: int, per_width: int) -> Callable[[], None]:
    """Counts what is done of width `number` on top of what the widths before it had."""
    done = number * per_width

    def step() -> None:
        nonlocal done
        done += 1
        progress(stage, done, num_widths * per_width)

    return step


def _label(target: Target, width: int | None) -> dict[str, Any]:
    return {"bit_width": width, "scheme": "served", "kv_format": _told(target, "kv_format")}


def _told(target: Target, name: str) -> Any:
    """What the server's /version says, if it has one."""
    return target.version.get(name) if isinstance(target.version, dict) else None
