"""From log probabilities of choices to accuracy, as lm-evaluation-harness counts it. Loads no torch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from anybit.engine.evaluate.questions import Question


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How many of a task's questions were answered rightly.

    `accuracy` takes the choice of the largest log probability; `accuracy_normalized` that of the largest per byte, which
    favours no short choice. Of equal ones the first is taken.
    """

    task: str
    questions: int
    accuracy: float
    accuracy_normalized: float

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "questions": self.questions,
            "accuracy": self.accuracy,
            "accuracy_stderr": standard_error(self.accuracy, self.questions),
            "acc_norm": self.accuracy_normalized,
            "acc_norm_stderr": standard_error(self.accuracy_normalized, self.questions),
        }


def score_tasks(questions: Sequence[Question], log_probabilities: Sequence[Sequence[float]]) -> list[TaskScore]:
    """One score per task, in the order in which the tasks first appear; log probabilities by question and choice."""
    right: dict[str, list[tuple[bool, bool]]] = {}
    for question, values in zip(questions, log_probabilities, strict=True):
        per_byte = [value / len(choice.encode()) for value, choice in zip(values, question.choices, strict=True)]
        judged = (_largest(values) == question.answer, _largest(per_byte) == question.answer)
        right.setdefault(question.task, []).append(judged)
    return [
        TaskScore(task, len(judged), _share(plain for plain, _ in judged), _share(normed for _, normed in judged))
        for task, judged in right.items()
    ]


def standard_error(share: float, count: int) -> float | None:
    """Of the mean of `count` answers that are right or wrong; None for a single one."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def _largest(values: Sequence[float]) -> int:
    return values.index(max(values))


def _share(right: Iterable[bool]) -> float:
    counted = list(right)
    return sum(counted) / len(counted)
