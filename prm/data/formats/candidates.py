"""Rows that hold a question and several candidate solutions; each candidate becomes an example.

- ``dreamprm-test`` (DreamPRM-1.5): ``{"question", "image_path", "candidates": [text, ...],
  "true_false": [bool, ...]}``, where a text is ``[Reasoning] ... Answer: X``.
- ``mathcheck-candidates``: ``{"id", "question", "image", "answer", "candidates": [{"model",
  "response", "auto_correct"}, ...]}``; ``answer`` is the reference.
- ``game24``: ``{"idx", "puzzle", "candidates": [{"steps": [{"text", "kind", "valid", "reach"}],
  "correct"}, ...]}``; a step's label is ``valid``.

``prm.data.splitter`` cuts free text into steps. ``group`` is the row's id, or an id derived from
the question where the row has none, so that the candidates of a question stay together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prm.data.formats.turns import question_text
from prm.data.record_fields import Location, Words, domain_key, extra_of
from prm.data.splitter import solution_steps
from prm.evaluation.final_answer import final_answer
from prm.schema import Step, StepExample


def matches_test(record: Mapping[str, Any]) -> bool:
    """Whether the record has candidate texts, and true or false for each."""
    return "candidates" in record and "true_false" in record


def matches_mathcheck(record: Mapping[str, Any]) -> bool:
    """Whether the record's candidates are objects with a response."""
    return _first_has(record, "response")


def matches_game24(record: Mapping[str, Any]) -> bool:
    """Whether the record is a puzzle with candidates."""
    return "puzzle" in record and "candidates" in record


def read_test(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return one example per candidate of a DreamPRM-1.5 test row.

    Raises:
        DataError: A field is wrong; the error names it (``true_false[3]``).
    """
    location.need(record, "question", "candidates", "true_false")
    images = location.images(record, "image_path", "image", "images", cut_parents=True)
    question = question_text(record, "question", len(images), location)
    texts = location.listed(record["candidates"], "candidates", "candidates")
    right = location.listed(record["true_false"], "true_false", "truth values")
    if len(right) != len(texts):
        found = Words(f"{len(right)} for {len(texts)} candidates")
        location.refuse("true_false", "as many values as candidates", found)
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
