"""Files of multiple-choice questions: what is read, what is refused, and how answers are counted."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anybit.engine.errors import SourceError
from anybit.engine.evaluate.accuracy import score_tasks, standard_error
from anybit.engine.evaluate.questions import (
    MAX_CHOICES,
    Question,
    builtin_questions,
    read_questions,
    tokenize_question,
)
from tests.fixtures.sentences import assert_one_sentence

GOOD = {"question": "The sky is", "choices": ["blue", "seven"], "answer": 0}


def written(tmp_path, *lines):
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def question(text="The sky is", choices=("blue", "seven"), answer=0, task="quiz"):
    return Question("Line 1 of quiz.jsonl", task, text, tuple(choices), answer)


def test_questions_are_read_in_order_with_their_tasks(tmp_path):
    other = {"context": "Two and two are", "choices": ["four", "fünf\u2028", "six"], "answer": 2, "task": "sums"}
    path = written(tmp_path, GOOD, "", json.dumps(other, ensure_ascii=False), "  ")
    assert read_questions(path) == [
        Question(f"Line 1 of {path}", "quiz", "The sky is", ("blue", "seven"), 0),
        Question(f"Line 3 of {path}", "sums", "Two and two are", ("four", "fünf\u2028", "six"), 2),
    ]


@pytest.mark.parametrize(
    ("line", "telling"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["question"]', "not a JSON object"),
        ({**GOOD, "hint": 1}, "'hint'"),
        ({**GOOD, "h" * 1000: 1}, "hhhh"),
        ({**GOOD, "context": "Twice"}, "either a question or a context"),
        ({"choices": ["a", "b"], "answer": 0}, "either a question or a context"),
        ({**GOOD, "question": " \n"}, "its question must be a text"),
        ({"context": 3, "choices": ["a", "b"], "answer": 0}, "its context must be a text"),
        ({**GOOD, "question": "half \ud83d"}, "half of a character"),
        ({**GOOD, "choices": ["a"]}, f"2 to {MAX_CHOICES}"),
        ({**GOOD, "choices": "ab"}, f"2 to {MAX_CHOICES}"),
        ({**GOOD, "choices": list(map(str, range(MAX_CHOICES + 1)))}, f"2 to {MAX_CHOICES}"),
        ({**GOOD, "choices": ["a", ""]}, "choice number 1"),
        ({**GOOD, "choices": [1, 2]}, "choice number 0"),
        ({**GOOD, "choices": ["a", "b", " a"]}, "two of its choices are the same"),
        ({**GOOD, "answer": 2}, "from 0 to 1"),
        ({**GOOD, "answer": -1}, "from 0 to 1"),
        ({**GOOD, "answer": True}, "from 0 to 1"),
        ({**GOOD, "answer": "blue"}, "from 0 to 1"),
        ({"question": "The sky is", "choices": ["blue", "seven"]}, "from 0 to 1"),
        ({**GOOD, "task": ""}, "its task must be a text"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_wrong(tmp_path, line, telling):
    with pytest.raises(SourceError) as caught:
        read_questions(written(tmp_path, GOOD, "", line, GOOD))
    assert_one_sentence(caught.value, "Line 3 of ", "quiz.jsonl", telling)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"", b" \n\n"])
def test_a_file_without_questions_is_refused(tmp_path, content):
    path = tmp_path / "quiz.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read_questions(path)
    assert_one_sentence(caught.value, "quiz.jsonl", "UTF-8" if content is None or b"\xff" in content else "no question")


def test_a_space_stands_between_text_and_choice_unless_one_is_there():
    assert question("Sky:").texts == ["Sky:", "Sky: blue", "Sky: seven"]
    assert question("Sky:\n").texts == ["Sky:", "Sky:\nblue", "Sky:\nseven"]
    assert question("Sky: ", [" blue", "seven"]).texts == ["Sky:", "Sky:  blue", "Sky: seven"]
    assert question("Sky:", ["\nblue", "seven"]).texts == ["Sky:", "Sky:\nblue", "Sky: seven"]


def test_a_choice_has_the_tokens_beyond_those_of_the_text():
    tokenized = tokenize_question(question(), [[1, 2], [1, 2, 3], [1, 2, 4, 5]], first=[9], max_tokens=5)
    assert (tokenized.context, tokenized.choices) == ((9, 1, 2), ((3,), (4, 5)))
    assert tokenized.sequences == [[9, 1, 2, 3], [9, 1, 2, 4, 5]]
    assert tokenized.num_tokens == 5


@pytest.mark.parametrize(
    ("token_ids", "first", "max_tokens", "telling"),
    [
        ([[1, 2], [1, 2, 3], [1, 2, 4, 5]], [9], 4, "5 tokens with its longest choice, but the context holds 4"),
        ([[1, 2], [1, 2, 3], [1, 2]], [], 10, "no choice"),
        ([[], [3], [4]], [], 10, "no choice"),
    ],
)
def test_questions_that_cannot_be_scored_are_refused(token_ids, first, max_tokens, telling):
    with pytest.raises(SourceError) as caught:
        tokenize_question(question(), token_ids, first, max_tokens)
    assert_one_sentence(caught.value, "Line 1 of quiz.jsonl", telling)


def test_accuracy_counts_sums_and_sums_per_byte_apart():
    """A long choice has the smaller sum and, per byte, the larger one; umlauts have two bytes."""
    questions = [question(choices=("no", "certainly not"), answer=1), question(choices=("üü", "abc"), answer=1)]
    (score,) = score_tasks(questions, [[-2.0, -6.0], [-4.0, -3.5]])
    assert (score.task, score.questions) == ("quiz", 2)
    assert score.accuracy == 0.5  # -2 > -6 is wrong, -3.5 > -4 is right
    assert score.accuracy_normalized == 0.5  # -6/13 > -2/2 is right, -4/4 > -3.5/3 is wrong
    assert score.to_json() == {
        "task": "quiz",
        "questions": 2,
        "accuracy": 0.5,
        "accuracy_stderr": 0.5,
        "acc_norm": 0.5,
        "acc_norm_stderr": 0.5,
    }


def test_of_equal_choices_the_first_is_taken():
    (score,) = score_tasks([question(choices=("ab", "cd"), answer=answer) for answer in (0, 1)], [[-1.0, -1.0]] * 2)
    assert (score.accuracy, score.accuracy_normalized) == (0.5, 0.5)


def test_tasks_are_scored_apart_in_the_order_they_appear():
    questions = [question(task="b"), question(task="a", answer=1), question(task="b")]
    scores = score_tasks(questions, [[0.0, -1.0], [0.0, -1.0], [0.0, -1.0]])
    assert [(score.task, score.questions, score.accuracy) for score in scores] == [("b", 2, 1.0), ("a", 1, 0.0)]


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_standard_error_is_that_of_the_mean(right):
    mean = sum(right) / len(right)
    variance = sum((value - mean) ** 2 for value in right) / (len(right) - 1)
    assert standard_error(mean, len(right)) == pytest.approx(math.sqrt(variance / len(right)), abs=1e-12)


def test_a_single_answer_has_no_standard_error():
    assert standard_error(1.0, 1) is None


def test_the_questions_that_ship_are_sound():
    questions = builtin_questions()
    assert len(questions) == 40
    assert {question.task for question in questions} == {"general_knowledge"}
    assert len({question.text for question in questions}) == 40
    assert all(len(question.choices) == 4 for question in questions)
    # No place of the answer is better than another.
    assert {[question.answer for question in questions].count(place) for place in range(4)} == {10}
