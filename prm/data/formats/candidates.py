"""Rows that hold a question and several candidate solutions; each candidate becomes an example.

- ``dreamprm-test`` (DreamPRM-1.5): ``{"question", "image_path", "candidates": [text, ...],
  "true_false": [bool, ...]}``, where a text is ``[Reasoning] ... Answer: X``.
- ``mathcheck-candidates``: ``{"id", "question", "image", "answer", "candidates": [{"model",
  "response", "auto_correct"}, ...]}``; ``answer`` is the reference.
- ``game24``: ``{"idx", "puzzle", "candidates": [{"steps": [{"text", "kind", "valid", "reach"}],
  "correct"}, ...]}``; a step's label is ``valid``.
- ``rlhflow-candidates`` (RLHFlow's best-of-N): ``{"prompt", "answers": [text, ...], "label" or
  "labels": [1 or 0, ...]}``. Answers with the mark "ки" are cut there.
- ``math-vision``: ``{"id", "model", "response", "model_answer", "correct"}``, an output of MATH-V,
  one candidate a row. The question and its picture stand in MATH-V's ``data/test.jsonl``, which is
  read below the folder of the images, unless the row has a ``question``.

``prm.data.splitter`` cuts free text into steps. ``group`` is the row's id, or an id derived from
the question where the row has none, so that the candidates of a question stay together.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from prm.data.formats.agreement import one_of
from prm.data.formats.marked import marked_steps
from prm.data.formats.turns import drop_numbered, question_text
from prm.data.json_rows import json_rows
from prm.data.record_fields import Location, Words, domain_key, extra_of
from prm.data.splitter import solution_steps
from prm.evaluation.final_answer import final_answer
from prm.schema import DataError, Step, StepExample


def matches_test(record: Mapping[str, Any]) -> bool:
    """Whether the record has candidate texts, and true or false for each."""
    return "candidates" in record and "true_false" in record


def matches_mathcheck(record: Mapping[str, Any]) -> bool:
    """Whether the record's candidates are objects with a response."""
    return _first_has(record, "response")


def matches_game24(record: Mapping[str, Any]) -> bool:
    """Whether the record is a puzzle with candidates."""
    return "puzzle" in record and "candidates" in record


def matches_rlhflow(record: Mapping[str, Any]) -> bool:
    """Whether the record is a prompt with answers."""
    return {"prompt", "answers"} <= record.keys()


def matches_math_vision(record: Mapping[str, Any]) -> bool:
    """Whether the record is a judged response of a model."""
    return {"response", "model_answer", "correct"} <= record.keys()


def read_test(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return one example per candidate of a DreamPRM-1.5 test row.

    Raises:
        DataError: A field is wrong; the error names it (``true_false[3]``).
    """
    location.need(record, "question", "candidates", "true_false")
    images = location.images(record, "image_path", "image", "images", cut_parents=True)
    question = question_text(record, "question", len(images), location)
    texts, right = _judged(record, "candidates", "true_false", location)
    raw = location.name(record, "id")
    group = location.name(record, "group") or raw or location.default_id(None, (question,))
    used = ("id", "question", "image_path", "image", "images", "candidates", "true_false", "group")
    extra = extra_of(record, (*used, domain_key(record)))
    domain = location.name(record, domain_key(record))
    examples = []
    for number, (text, truth) in enumerate(zip(texts, right, strict=True)):
        with location.one_of_several():
            if not isinstance(truth, bool):
                location.refuse(f"true_false[{number}]", "true or false", truth)
            steps = _split(text, f"candidates[{number}]", location)
            examples.append(
                _example(
                    location.default_id(raw, (question, text), number),
                    (question, images, group, domain),
                    steps,
                    final_answer(text) or "",
                    truth,
                    extra,
                )
            )
    return tuple(examples)


def read_rlhflow(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return one example per answer of a best-of-N row of RLHFlow.

    Raises:
        DataError: A field is wrong; the error names it (``label[3]``).
    """
    values = one_of(record, ("label", "labels"), location)
    location.need(record, "prompt", "answers", values)
    question = location.text(record["prompt"], "prompt")
    texts, right = _judged(record, "answers", values, location)
    raw = location.name(record, "id")
    group = location.name(record, "group") or raw or location.default_id(None, (question,))
    extra = extra_of(record, ("id", "prompt", "answers", values, "group", domain_key(record)))
    domain = location.name(record, domain_key(record))
    examples = []
    for number, (text, truth) in enumerate(zip(texts, right, strict=True)):
        with location.one_of_several():
            field = f"answers[{number}]"
            if truth not in (0, 1):
                location.refuse(f"{values}[{number}]", "1 or 0", truth)
            marked = marked_steps(location.text(text, field), field, location)
            steps = _split(text, field, location) if marked is None else tuple(map(Step, marked))
            examples.append(
                _example(
                    location.default_id(raw, (question, text), number),
                    (question, (), group, domain),
                    steps,
                    final_answer(steps[-1].text if marked else text) or "",
                    bool(truth),
                    extra,
                )
            )
    return tuple(examples)


def read_math_vision(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of an output of MATH-V.

    Raises:
        DataError: A field is wrong; the error names it.
    """
    location.need(record, "id", "response", "correct")
    name = location.name(record, "id")
    asked = record if "question" in record else _published(name, location)
    images = location.images(asked, "image", "images")
    text = location.text(record["response"], "response")
    correct = location.optional_bool(record, "correct")
    if correct is None:
        location.refuse("correct", "true or false", None)
    question = drop_numbered(location.text(asked["question"], "question"), len(images))
    options = asked.get("options")
    if isinstance(options, list) and options:
        lines = (f"({chr(65 + n)}) {option}" for n, option in enumerate(options))
        question = "\n".join((question, *lines))
    answer = location.optional_text(record, "model_answer", blank=True) or final_answer(text)
    used = ("id", "response", "model_answer", "correct", "question", "image", "images", "options")
    return (
        _example(
            location.default_id(name, (str(record.get("model")), text)),
            (question, images, name, location.name(asked, "subject")),
            _split(text, "response", location),
            answer or "",
            correct,
            extra_of(record, used),
        ),
    )


def read_mathcheck(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return one example per candidate of a MathCheck row.

    Raises:
        DataError: A field is wrong; the error names it (``candidates[3].response``).
    """
    location.need(record, "id", "question", "candidates")
    images = location.images(record, "image", "images")
    question = location.text(record["question"], "question")
    raw = location.name(record, "id")
    extra = extra_of(record, ("id", "question", "image", "images", "candidates", "group"))
    examples = []
    given = location.listed(record["candidates"], "candidates", "candidates")
    for number, candidate in enumerate(given):
        with location.one_of_several():
            field = f"candidates[{number}]"
            truth = _field(candidate, "auto_correct", field, location)
            if not isinstance(truth, bool):
                location.refuse(f"{field}.auto_correct", "true or false", truth)
            text = _field(candidate, "response", field, location)
            examples.append(
                _example(
                    f"{raw}.{number}",
                    (question, images, raw, None),
                    _split(text, f"{field}.response", location),
                    final_answer(text) or "",
                    truth,
                    {**extra, "model": candidate.get("model")},
                )
            )
    return tuple(examples)


def read_game24(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return one example per candidate of a Game-of-24 row.

    Raises:
        DataError: A field is wrong; the error names it (``candidates[3].steps[1].valid``).
    """
    location.need(record, "idx", "puzzle", "candidates")
    puzzle = location.text(record["puzzle"], "puzzle")
    question = f"Use the numbers {puzzle}, each once, and + - * / to obtain 24."
    raw = location.name(record, "idx")
    examples = []
    given = location.listed(record["candidates"], "candidates", "candidates")
    for number, candidate in enumerate(given):
        with location.one_of_several():
            field = f"candidates[{number}]"
            steps, reach = [], []
            listed = _field(candidate, "steps", field, location)
            for count, step in enumerate(location.listed(listed, f"{field}.steps", "steps")):
                inner = f"{field}.steps[{count}]"
                text = location.text(_field(step, "text", inner, location), f"{inner}.text")
                label = location.label(_field(step, "valid", inner, location), f"{inner}.valid")
                steps.append(Step(text, label))
                reach.append(step.get("reach"))
            truth = _field(candidate, "correct", field, location)
            if truth not in (0, 1):
                location.refuse(f"{field}.correct", "0 or 1", truth)
            examples.append(
                _example(
                    f"{raw}.{number}",
                    (question, (), raw, None),
                    tuple(steps),
                    final_answer(steps[-1].text) or "",
                    bool(truth),
                    {"puzzle": puzzle, "reach": reach},
                )
            )
    return tuple(examples)


def _example(
    name: str,
    shared: tuple[str, tuple[Path, ...], str | None, str | None],
    steps: tuple[Step, ...],
    answer: str,
    correct: bool,
    extra: Mapping[str, Any],
) -> StepExample:
    question, images, group, domain = shared
    return StepExample(name, question, images, steps, domain, answer, correct, group, extra)


def _judged(
    record: Mapping[str, Any], texts: str, values: str, location: Location
) -> tuple[list[Any], list[Any]]:
    """Return the candidates and as many truth values."""
    given = location.listed(record[texts], texts, "candidates" if texts == "candidates" else texts)
    right = location.listed(record[values], values, "truth values")
    if len(right) != len(given):
        found = Words(f"{len(right)} for {len(given)} {texts}")
        location.refuse(values, f"as many values as {texts}", found)
    return given, right


def _published(name: str | None, location: Location) -> Mapping[str, Any]:
    """Return the question of MATH-V with this id."""
    path = location.root / "data" / "test.jsonl"
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        location.refuse(
            "question",
            f"the question in the row, or in {path}",
            Words("neither"),
            "set the image root to a clone of MATH-V, which holds data/test.jsonl and images",
        )
    asked = _questions(path, changed).get(str(name))
    if asked is None:
        location.refuse("id", f"the id of a question in {path}", name)
    return asked


@lru_cache(maxsize=1)  # every row asks for the same file
def _questions(path: Path, changed: int) -> dict[str, Mapping[str, Any]]:
    questions: dict[str, Mapping[str, Any]] = {}
    for _, row in json_rows(path):
        if isinstance(row, DataError):
            raise row
        if isinstance(row, dict) and "question" in row:
            questions[str(row.get("id"))] = row
    return questions


def _first_has(record: Mapping[str, Any], key: str) -> bool:
    given = record.get("candidates")
    return bool(
        isinstance(given, list) and given and isinstance(given[0], dict) and key in given[0]
    )


def _field(value: object, name: str, field: str, location: Location) -> Any:
    if not isinstance(value, dict):
        location.refuse(field, f"an object with {name!r}", value)
    if name not in value:
        location.refuse(f"{field}.{name}", f"the field {name!r}", Words("nothing"))
    return value[name]


def _split(text: Any, field: str, location: Location) -> tuple[Step, ...]:
    steps = solution_steps(location.text(text, field))
    if not steps:
        location.refuse(field, "a solution with at least one step", text)
    return tuple(Step(step) for step in steps)
