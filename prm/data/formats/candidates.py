"""Rows that hold a question and several candidate solutions; each candidate becomes an example.

- ``dreamprm-test`` (DreamPRM-1.5): ``{"question", "image_path", "candidates": [text, ...],
  "true_false": [bool, ...]}``, a text being ``[Reasoning] ... Answer: X``.
- ``mathcheck-candidates``: ``{"id", "question", "image", "answer", "candidates": [{"model",
  "response", "auto_correct"}, ...]}``; ``answer`` is the reference.
- ``game24``: ``{"idx", "puzzle", "candidates": [{"steps": [{"text", "kind", "valid", "reach"}],
  "correct"}, ...]}``; a step's label is ``valid``.

Free text is cut into steps by ``prm.data.splitter``. ``group`` is the row's id (or, without one, an id
made from the question), so that the candidates of a question stay together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prm.data.formats.turns import question_text
from prm.data.record_fields import Place, Words, domain_key, extra_of
from prm.schema import Step, StepExample
from prm.data.splitter import final_answer, solution_steps


def matches_test(record: Mapping[str, Any]) -> bool:
    """Whether the record has candidate texts, and true or false for each."""
    return "candidates" in record and "true_false" in record


def matches_mathcheck(record: Mapping[str, Any]) -> bool:
    """Whether the record's candidates are objects with a response."""
    return _first_has(record, "response")


def matches_game24(record: Mapping[str, Any]) -> bool:
    """Whether the record is a puzzle with candidates."""
    return "puzzle" in record and "candidates" in record


def read_test(record: Mapping[str, Any], place: Place) -> tuple[StepExample, ...]:
    """One example per candidate of a DreamPRM-1.5 test row.

    Raises:
        DataError: A field is wrong; the error names it (``true_false[3]``).
    """
    place.need(record, "question", "candidates", "true_false")
    images = place.images(record, "image_path", "image", "images", cut_parents=True)
    question = question_text(record, "question", len(images), place)
    texts = place.listed(record["candidates"], "candidates", "candidates")
    right = place.listed(record["true_false"], "true_false", "truth values")
    if len(right) != len(texts):
        found = Words(f"{len(right)} for {len(texts)} candidates")
        place.refuse("true_false", "as many values as candidates", found)
    raw = place.name(record, "id")
    group = place.name(record, "group") or raw or place.made_id(None, (question,))
    used = ("id", "question", "image_path", "image", "images", "candidates", "true_false", "group")
    extra = extra_of(record, (*used, domain_key(record)))
    domain = place.name(record, domain_key(record))
    examples = []
    for number, (text, truth) in enumerate(zip(texts, right, strict=True)):
        if not isinstance(truth, bool):
            place.refuse(f"true_false[{number}]", "true or false", truth)
        steps = _split(text, f"candidates[{number}]", place)
        examples.append(
            _example(
                place.made_id(raw, (question, text), number),
                (question, images, group, domain),
                steps,
                final_answer(text) or "",
                truth,
                extra,
            )
        )
    return tuple(examples)


def read_mathcheck(record: Mapping[str, Any], place: Place) -> tuple[StepExample, ...]:
    """One example per candidate of a MathCheck row.

    Raises:
        DataError: A field is wrong; the error names it (``candidates[3].response``).
    """
    place.need(record, "id", "question", "candidates")
    images = place.images(record, "image", "images")
    question = place.text(record["question"], "question")
    raw = place.name(record, "id")
    extra = extra_of(record, ("id", "question", "image", "images", "candidates", "group"))
    examples = []
    given = place.listed(record["candidates"], "candidates", "candidates")
    for number, candidate in enumerate(given):
        field = f"candidates[{number}]"
        truth = _field(candidate, "auto_correct", field, place)
        if not isinstance(truth, bool):
            place.refuse(f"{field}.auto_correct", "true or false", truth)
        text = _field(candidate, "response", field, place)
        examples.append(
            _example(
                f"{raw}.{number}",
                (question, images, raw, None),
                _split(text, f"{field}.response", place),
                final_answer(text) or "",
                truth,
                {**extra, "model": candidate.get("model")},
            )
        )
    return tuple(examples)


def read_game24(record: Mapping[str, Any], place: Place) -> tuple[StepExample, ...]:
    """One example per candidate of a Game-of-24 row.

    Raises:
        DataError: A field is wrong; the error names it (``candidates[3].steps[1].valid``).
    """
    place.need(record, "idx", "puzzle", "candidates")
    puzzle = place.text(record["puzzle"], "puzzle")
    question = f"Use the numbers {puzzle}, each once, and + - * / to obtain 24."
    raw = place.name(record, "idx")
    examples = []
    given = place.listed(record["candidates"], "candidates", "candidates")
    for number, candidate in enumerate(given):
        field = f"candidates[{number}]"
        steps, reach = [], []
        listed = _field(candidate, "steps", field, place)
        for count, step in enumerate(place.listed(listed, f"{field}.steps", "steps")):
            inner = f"{field}.steps[{count}]"
            text = place.text(_field(step, "text", inner, place), f"{inner}.text")
            label = place.label(_field(step, "valid", inner, place), f"{inner}.valid")
            steps.append(Step(text, label))
            reach.append(step.get("reach"))
        truth = _field(candidate, "correct", field, place)
        if truth not in (0, 1):
            place.refuse(f"{field}.correct", "0 or 1", truth)
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


def _field(value: object, name: str, field: str, place: Place) -> Any:
    if not isinstance(value, dict):
        place.refuse(field, f"an object with {name!r}", value)
    if name not in value:
        place.refuse(f"{field}.{name}", f"the field {name!r}", Words("nothing"))
    return value[name]


def _split(text: Any, field: str, place: Place) -> tuple[Step, ...]:
    steps = solution_steps(place.text(text, field))
    if not steps:
        place.refuse(field, "a solution with at least one step", text)
    return tuple(Step(step) for step in steps)
