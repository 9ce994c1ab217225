"""Multiple-choice questions: one JSON object per line, and the tokens that score them. Loads no torch.

    {"question": "The capital of France is", "choices": ["Berlin", "Paris"], "answer": 1, "task": "geography"}

`question`, or under its other name `context`, is the text that every choice continues; `answer` counts from 0; without
`task` the file's name stands for it. The tokens are those of lm-evaluation-harness: a choice's own are what the text with
the choice has beyond the tokens of the text alone.
"""

import importlib.resources
import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anybit.engine.errors import SourceError

BUILTIN_QUESTIONS = "general_knowledge.jsonl"
MAX_CHOICES = 64
_TEXT_NAMES = ("question", "context")
_FIELDS = {*_TEXT_NAMES, "choices", "answer", "task"}


@dataclass(frozen=True, slots=True)
class Question:
    """A text and its possible continuations, of which number `answer` is right; `place` says where it was read."""

    place: str
    task: str
    text: str
    choices: tuple[str, ...]
    answer: int

    @property
    def texts(self) -> list[str]:
        """What is to be tokenized: the text alone, then the text with each choice, a space between them."""
        spaced = (
            self.text + ("" if self.text[-1].isspace() or choice[0].isspace() else " ") for choice in self.choices
        )
        return [self.text.rstrip(), *map(operator.add, spaced, self.choices)]


@dataclass(frozen=True, slots=True)
class TokenQuestion:
    """A question as token ids: those that every choice follows, and those of each choice."""

    question: Question
    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Of the context with its longest choice."""
        return len(self.context) + max(map(len, self.choices))

    @property
    def sequences(self) -> list[list[int]]:
        return [[*self.context, *choice] for choice in self.choices]


class _WrongQuestionError(Exception):
    """What is wrong with one question; the end of a sentence."""


def builtin_questions() -> list[Question]:
    """Forty easy questions of general knowledge, written for this project."""
    content = (importlib.resources.files("anybit.engine.evaluate") / BUILTIN_QUESTIONS).read_text(encoding="utf-8")
    return _parse(content, BUILTIN_QUESTIONS)


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSON Lines file; SourceError names the first line that is not one, and why."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The questions in {path} cannot be read as UTF-8.") from error
    return _parse(content, str(path))


def tokenize_question(
    question: Question, token_ids: Sequence[Sequence[int]], first: Sequence[int], max_tokens: int
) -> TokenQuestion:
    """From the tokens of `question.texts`, without special ones; `first` are those that a model expects before a text.

    SourceError if a choice has no tokens of its own, or if more than `max_tokens` are needed.
    """
    context, *with_choices = token_ids
    choices = tuple(tuple(whole[len(context) :]) for whole in with_choices)
    tokenized = TokenQuestion(question, (*first, *context), choices)
    if not tokenized.context or not all(choices):
        raise SourceError(f"{question.place} cannot be scored: the model's tokenizer sees no choice in it.")
    if tokenized.num_tokens > max_tokens:
        needed = f"{tokenized.num_tokens} tokens with its longest choice"
        raise SourceError(f"{question.place} has {needed}, but the context holds {max_tokens}.")
    return tokenized


def _parse(content: str, name: str) -> list[Question]:
    questions = list(_parse_lines(content, name))
    if not questions:
        raise SourceError(f"{name} holds no question.")
    return questions


def _parse_lines(content: str, name: str) -> Iterator[Question]:
    # Not splitlines(): JSON strings may hold the other characters that it takes for the end of a line.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            place = f"Line {number} of {name}"
            try:
                yield _question(line, place, Path(name).stem)
            except _WrongQuestionError as error:
                raise SourceError(f"{place} is not a question: {error}.") from None


def _question(line: str, place: str, default_task: str) -> Question:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise _WrongQuestionError("it is not valid JSON") from None
    if not isinstance(value, dict):
        raise _WrongQuestionError("it is not a JSON object")
    unknown = sorted(value.keys() - _FIELDS)
    if unknown:
        raise _WrongQuestionError(
            f"the field {_shown(unknown[0])} is not one of question or context, choices, answer, task"
        )
    names = [name for name in _TEXT_NAMES if name in value]
    if len(names) != 1:
        raise _WrongQuestionError("it needs either a question or a context")
    choices = _choices(value.get("choices"))
    answer = value.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise _WrongQuestionError(f"its answer must be a number from 0 to {len(choices) - 1}, which counts the choices")
    task = _text(value["task"], "task") if "task" in value else default_task
    return Question(place, task, _text(value[names[0]], names[0]), choices, answer)


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not 2 <= len(value) <= MAX_CHOICES:
        raise _WrongQuestionError(f"its choices must be a list of 2 to {MAX_CHOICES} texts")
    choices = tuple(_text(choice, f"choice number {index}") for index, choice in enumerate(value))
    if len({choice.strip() for choice in choices}) != len(choices):
        raise _WrongQuestionError("two of its choices are the same")
    return choices


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _WrongQuestionError(f"its {what} must be a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _WrongQuestionError(f"its {what} holds half of a character, which UTF-8 cannot write") from None
    return value


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 40 else name[:40] + "…")
