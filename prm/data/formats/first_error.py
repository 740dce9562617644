"""Step benchmarks that name the first wrong step of a solution.

The steps before it are right, it is wrong, and those after it were not judged (no label).

- ``processbench``: ``{"id", "generator", "problem", "steps", "final_answer_correct", "label"}``.
  ``label`` is the index of the first wrong step, or -1. The domain is the subset that the id starts
  with (``gsm8k-12``).
- ``big-bench-mistake``: ``{"input", "steps", "answer", "target", "mistake_index"}``. The index is
  counted from 0, or null; ``correct`` is whether ``answer`` is ``target``.
- ``mr-ben``: ``{"Question_UUID", "Subject", "Question", "Options", "Model_Solution_Steps",
  "Model_Solution_Correctness", "Model_Solution_First_Error_Step"}``; a published file is one object
  of lists of these. "2" is the step that starts with "Step 2", or else the second; a line of code
  is the step of that text.
- ``mathcheck-checklist`` (MathCheck as published): ``{"task_type", "group_id", "id", "question",
  "solution", "answer"}``. Of ``process_judging``, the answer "Step 2" is the first wrong step; of
  ``outcome_judging``, every step of a "Correct" solution is right (they are reference solutions),
  and nothing is known of the steps of an "Incorrect" one. Other tasks hold no solution and give no
  example.
- ``mathcheck`` (converted by hand): ``{"id", "group", "question", "image", "steps", "labels",
  "first_error", "outcome_correct"}``. 1 means right, 0 wrong, and -1 after the first mistake (no
  label); ``first_error`` is counted from 1, 0 for none. Since -1 means wrong elsewhere (PRM800K),
  it is read only beside ``first_error``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from prm.data.formats.stepwise import labelled_steps
from prm.data.record_fields import Location, Words, extra_of
from prm.data.splitter import solution_steps
from prm.evaluation.final_answer import final_answer
from prm.schema import Step, StepExample

_SIGNS: Mapping[int | str, float | None] = {1: 1.0, 0: 0.0, -1: None, "+": 1.0, "-": 0.0}
_WITH_SOLUTION = ("outcome_judging", "process_judging")
_TASKS = ("solving", "answerable_judging", *_WITH_SOLUTION)
_STEP_NAME = re.compile(r"\s*+step\s*+(\d{1,3})\s*+\.?\s*+$", re.IGNORECASE)
_THE_ANSWER = re.compile(r"^[ \t]*\**the (?:final )?answer is\b", re.IGNORECASE | re.MULTILINE)


def matches_processbench(record: Mapping[str, Any]) -> bool:
    """Whether the record is a problem with steps and the index of the first mistake."""
    return {"problem", "steps", "label"} <= record.keys()


def matches_big_bench_mistake(record: Mapping[str, Any]) -> bool:
    """Whether the record has steps and the index of a mistake."""
    return {"steps", "mistake_index"} <= record.keys()


def matches_mr_ben(record: Mapping[str, Any]) -> bool:
    """Whether the record holds the steps of a model's solution under MR-Ben's name."""
    return "Model_Solution_Steps" in record


def matches_mathcheck_checklist(record: Mapping[str, Any]) -> bool:
    """Whether the record is a task of MathCheck about a question."""
    return {"task_type", "question_type", "question"} <= record.keys()


def matches_mathcheck(record: Mapping[str, Any]) -> bool:
    """Whether the record holds a question and steps as texts, with labels or without."""
    steps = record.get("steps")
    texts = isinstance(steps, list) and bool(steps) and isinstance(steps[0], str)
    return texts and "question" in record


def read_processbench(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a ProcessBench row.

    Raises:
        DataError: A field is wrong; the error names it.
    """
    location.need(record, "id", "problem", "steps", "label")
    texts = location.listed(record["steps"], "steps", "steps")
    error = record["label"]
    if isinstance(error, bool) or not isinstance(error, int) or not -1 <= error < len(texts):
        location.refuse("label", f"-1 or the index of a step, 0 to {len(texts) - 1}", error)
    name = str(location.name(record, "id"))
    subset, dash, _ = name.rpartition("-")
    return (
        StepExample(
            id=name,
            question=location.text(record["problem"], "problem"),
            images=(),
            steps=_until(texts, "steps", None if error == -1 else error, location),
            domain=subset if dash and subset else None,
            correct=location.optional_bool(record, "final_answer_correct"),
            extra=extra_of(record, ("id", "problem", "steps", "final_answer_correct")),
        ),
    )


def read_big_bench_mistake(
    record: Mapping[str, Any], location: Location
) -> tuple[StepExample, ...]:
    """Return the example of a row of BIG-Bench Mistake.

    Raises:
        DataError: A field is wrong; the error names it.
    """
    location.need(record, "input", "steps", "mistake_index")
    question = location.text(record["input"], "input")
    texts = location.listed(record["steps"], "steps", "steps")
    error = record["mistake_index"]
    known = isinstance(error, int) and not isinstance(error, bool) and 0 <= error < len(texts)
    if error is not None and not known:
        expected = f"null or the index of a step, 0 to {len(texts) - 1}"
        location.refuse("mistake_index", expected, error)
    answer = location.optional_text(record, "answer", blank=True)
    target = location.optional_text(record, "target", blank=True)
    compared = answer is not None and target is not None
    return (
        StepExample(
            id=location.own_id(record, (question, *map(str, texts))),
            question=question,
            images=(),
            steps=_until(texts, "steps", error, location),
            answer=answer,
            correct=str(answer).strip() == str(target).strip() if compared else None,
            group=location.name(record, "group"),
            extra=extra_of(record, ("id", "input", "steps", "answer", "group")),
        ),
    )


def read_mr_ben(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a row of MR-Ben.

    Raises:
        DataError: A field is wrong; the error names it (``Model_Solution_Steps[2]``).
    """
    names = ("Question", "Model_Solution_Steps", "Model_Solution_Correctness")
    location.need(record, *names, "Model_Solution_First_Error_Step")
    question = location.text(record["Question"], "Question")
    options = location.optional_text(record, "Options", blank=True)
    if options and options.strip():
        question = f"{question}\nOptions:\n{options.strip()}"
    given = location.listed(record["Model_Solution_Steps"], "Model_Solution_Steps", "steps")
    texts = [location.step(text, f"Model_Solution_Steps[{n}]") for n, text in enumerate(given)]
    judged = record["Model_Solution_Correctness"]
    if judged not in ("correct", "incorrect"):
        location.refuse("Model_Solution_Correctness", '"correct" or "incorrect"', judged)
    error = _mr_ben_error(record, texts, judged == "correct", location)
    raw = location.name(record, "Question_UUID")
    used = (*names, "Options", "Question_UUID", "Subject", "id", "group")
    return (
        StepExample(
            id=location.name(record, "id") or location.default_id(raw, (question, *texts)),
            question=question,
            images=(),
            steps=_until(texts, "Model_Solution_Steps", error, location),
            domain=location.name(record, "Subject"),
            answer=final_answer(texts[-1]),
            correct=judged == "correct",
            group=location.name(record, "group") or raw,
            extra=extra_of(record, used),
        ),
    )


def read_mathcheck_checklist(
    record: Mapping[str, Any], location: Location
) -> tuple[StepExample, ...]:
    """Return the example of a published MathCheck row; none if its task has no solution.

    Raises:
        DataError: A field is wrong; the error names it.
    """
    location.need(record, "task_type", "question")
    task = record["task_type"]
    if task not in _TASKS:
        location.refuse("task_type", f"one of {', '.join(_TASKS)}", task)
    if task not in _WITH_SOLUTION:
        return ()
    location.need(record, "id", "group_id", "solution", "answer")
    texts = _checklist_steps(location.text(record["solution"], "solution"))
    if not texts:
        location.refuse("solution", "a solution with at least one step", record["solution"])
    answer = record["answer"]
    correct: bool | None = None
    if task == "outcome_judging":
        if answer not in ("Correct", "Incorrect"):
            location.refuse("answer", '"Correct" or "Incorrect"', answer)
        correct = answer == "Correct"
        steps = tuple(Step(text, 1.0 if correct else None) for text in texts)
    else:
        named = _STEP_NAME.match(answer) if isinstance(answer, str) else None
        error = None if named is None else _numbered(texts, int(named[1]))
        if error is None:
            location.refuse("answer", f'"Step 1" to "Step {len(texts)}"', answer)
        steps = _until(texts, "solution", error, location)
    group, name = location.name(record, "group_id"), location.name(record, "id")
    used = ("id", "group_id", "question", "image", "images", "solution", "task_type")
    return (
        StepExample(
            id=f"{group}-{name}",
            question=location.text(record["question"], "question"),
            images=location.images(record, "image", "images"),
            steps=steps,
            domain=location.name(record, "domain"),
            answer=final_answer(texts[-1]),
            correct=correct,
            group=group,
            extra=extra_of(record, (*used, "domain"), task=task),
        ),
    )


def read_mathcheck(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a converted MathCheck row, or of any with labels beside text steps.

    Raises:
        DataError: A field is wrong; the error names it (``labels[2]``).
    """
    location.need(record, "question", "steps")
    if "labels" not in record and "label" not in record:
        count = len(location.listed(record["steps"], "steps", "steps"))
        location.refuse(
            "labels",
            f"the field 'labels', a list of {count}, one for every step",
            Words("nothing"),
            'give "+", "-", 1, 0 or null for every step, or write "labels": null if none is known',
        )
    location.need(record, "id", "labels")
    used = ("id", "question", "image", "images", "steps", "labels", "group", "outcome_correct")
    steps = labelled_steps(record, "steps", "labels", location, _SIGNS)
    _compare_first_error(record, location)
    return (
        StepExample(
            id=str(location.name(record, "id")),
            question=location.text(record["question"], "question"),
            images=location.images(record, "image", "images"),
            steps=steps,
            correct=location.optional_bool(record, "outcome_correct"),
            group=location.name(record, "group"),
            extra=extra_of(record, used),
        ),
    )


def _until(
    texts: Sequence[object], field: str, error: int | None, location: Location
) -> tuple[Step, ...]:
    right = len(texts) if error is None else error
    return tuple(
        Step(
            location.step(text, f"{field}[{number}]"),
            1.0 if number < right else 0.0 if number == right else None,
        )
        for number, text in enumerate(texts)
    )


def _numbered(texts: Sequence[str], number: int) -> int | None:
    """Return the index of the step that is called "Step ``number``", or else of that place."""
    head = re.compile(rf"\W*step\s*{number}(?!\d)", re.IGNORECASE)
    found = next((place for place, text in enumerate(texts) if head.match(text)), number - 1)
    return found if 0 <= found < len(texts) else None


def _mr_ben_error(
    record: Mapping[str, Any], texts: Sequence[str], correct: bool, location: Location
) -> int | None:
    field = "Model_Solution_First_Error_Step"
    given = record[field]
    if given is None or (isinstance(given, str) and given.strip().upper() in ("N/A", "")):
        if not correct:
            expected = "the number of a step, since Model_Solution_Correctness is 'incorrect'"
            location.refuse(field, expected, given)
        return None
    if correct:
        expected = "\"N/A\", since Model_Solution_Correctness is 'correct'"
        location.refuse(field, expected, given)
    text = str(given).strip() if isinstance(given, str | int) else ""
    digits = re.fullmatch(r"(?:step\s*)?(\d{1,3})\.?", text, re.IGNORECASE)
    error = None if digits is None else _numbered(texts, int(digits[1]))
    if digits is None:
        error = next((n for n, step in enumerate(texts) if text and step.strip() == text), None)
    if error is None:
        expected = f'a step, "1" to "{len(texts)}", or "N/A"'
        location.refuse(field, expected, given)
    return error


def _checklist_steps(text: str) -> list[str]:
    """Split a solution of MathCheck; a sentence that states the answer is a step of its own."""
    steps = solution_steps(text)
    if not steps:
        return []
    *before, last = steps
    cuts = [0, *(match.start() for match in _THE_ANSWER.finditer(last)), len(last)]
    pieces = (last[start:end].strip() for start, end in pairwise(cuts))
    return [*before, *filter(None, pieces)]


def _compare_first_error(record: Mapping[str, Any], location: Location) -> None:
    """Refuse labels that can mean two things, or that contradict ``first_error``."""
    labels, error = record["labels"], record.get("first_error")
    if error is not None and (isinstance(error, bool) or not isinstance(error, int)):
        location.refuse("first_error", "an integer or null", error)
    if labels is None:
        return
    wrong = next((place for place, label in enumerate(labels, 1) if label in (0, "-")), 0)
    if error is None:
        if -1 in labels:
            location.refuse(
                "labels",
                "labels of one meaning",
                Words("-1, which is 'not judged' in MathCheck and 'wrong' in PRM800K"),
                "write a wrong step as 0 or '-' and one without a label as null, or give "
                "'first_error' (counted from 1) as MathCheck does",
            )
        return
    early = next((place for place, label in enumerate(labels, 1) if label == -1), 0)
    if error != wrong or (early and not 0 < wrong < early):
        first = f"step {wrong} is the first wrong one" if wrong else "no step is wrong"
        place = f", -1 at step {early}" if early and not 0 < wrong < early else ""
        location.refuse(
            "first_error",
            "the number of the first wrong step in 'labels', counted from 1, or 0 if none is",
            Words(f"first_error {error}, and labels in which {first}{place}"),
            "correct one of the two",
        )
