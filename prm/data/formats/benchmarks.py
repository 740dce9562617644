"""Step benchmarks: where in a solution the first mistake is, or which of its steps are right.

- ``processbench``: ``{"id", "generator", "problem", "steps", "final_answer_correct", "label"}``,
  ``label`` the index of the first wrong step or -1. Steps before it are right, it is wrong, those
  behind it were not judged. The domain is the subset that the id starts with (``gsm8k-12``).
- ``visualprocessbench``: ``{"image", "question", "answer", "response": {"steps",
  "process_correctness"}, "policy_model", "data_source"}``; 1 right, -1 wrong, 0 neutral (no label).
- ``mathcheck``: ``{"id", "group", "question", "image", "steps", "labels", "first_error",
  "outcome_correct"}``; 1 right, 0 wrong, -1 behind the first mistake (no label).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prm.data.formats.stepwise import labelled_steps
from prm.data.formats.turns import question_text
from prm.data.record_fields import Place, extra_of
from prm.schema import Step, StepExample

_NEUTRAL_SIGNS = {1: 1.0, -1: 0.0, 0: None}
_FIRST_ERROR_SIGNS = {1: 1.0, 0: 0.0, -1: None}


def matches_processbench(record: Mapping[str, Any]) -> bool:
    """Whether the record is a problem with steps and the place of the first mistake."""
    return {"problem", "steps", "label"} <= record.keys()


def matches_visualprocessbench(record: Mapping[str, Any]) -> bool:
    """Whether the record's response holds steps and their correctness."""
    response = record.get("response")
    return isinstance(response, dict) and "process_correctness" in response


def matches_mathcheck(record: Mapping[str, Any]) -> bool:
    """Whether the record holds steps as texts and their labels beside them."""
    steps = record.get("steps")
    texts = isinstance(steps, list) and bool(steps) and isinstance(steps[0], str)
    return texts and {"question", "labels"} <= record.keys()


def read_processbench(record: Mapping[str, Any], place: Place) -> tuple[StepExample, ...]:
    """The example of a ProcessBench row.

    Raises:
        DataError: A field is wrong; the error names it.
    """
    place.need(record, "id", "problem", "steps", "label")
    texts = place.listed(record["steps"], "steps", "steps")
    error = record["label"]
    if isinstance(error, bool) or not isinstance(error, int) or not -1 <= error < len(texts):
        place.refuse("label", f"-1 or the index of a step, 0 to {len(texts) - 1}", error)
    right = len(texts) if error == -1 else error
    steps = tuple(
        Step(
            place.text(text, f"steps[{number}]"),
            1.0 if number < right else 0.0 if number == right else None,
        )
        for number, text in enumerate(texts)
    )
    name = str(place.name(record, "id"))
    subset, dash, _ = name.rpartition("-")
    return (
        StepExample(
            id=name,
            question=place.text(record["problem"], "problem"),
            images=(),
            steps=steps,
            domain=subset if dash and subset else None,
            correct=place.optional_bool(record, "final_answer_correct"),
            extra=extra_of(record, ("id", "problem", "steps", "final_answer_correct")),
        ),
    )


def read_visualprocessbench(record: Mapping[str, Any], place: Place) -> tuple[StepExample, ...]:
    """The example of a VisualProcessBench row.

    Raises:
        DataError: A field is wrong; the error names it (``response.process_correctness[2]``).
    """
    place.need(record, "question", "response")
    response = record["response"]
    if not isinstance(response, dict):
        place.refuse("response", 'an object with "steps" and "process_correctness"', response)
    fields = {f"response.{name}": value for name, value in response.items()}
    place.need(fields, "response.steps", "response.process_correctness")
    images = place.images(record, "image", "images")
    question = question_text(record, "question", len(images), place)
    steps = labelled_steps(
        fields, "response.steps", "response.process_correctness", place, _NEUTRAL_SIGNS
    )
    used = ("id", "question", "image", "images", "response", "data_source", "answer")
    return (
        StepExample(
            id=place.own_id(record, (question, *(step.text for step in steps))),
            question=question,
            images=images,
            steps=steps,
            domain=place.name(record, "data_source"),
            extra=extra_of(record, used, reference_answer=record.get("answer")),
        ),
    )


def read_mathcheck(record: Mapping[str, Any], place: Place) -> tuple[StepExample, ...]:
    """The example of a MathCheck row.

    Raises:
        DataError: A field is wrong; the error names it (``labels[2]``).
    """
    place.need(record, "id", "question", "steps", "labels")
    used = ("id", "question", "image", "images", "steps", "labels", "group", "outcome_correct")
    correct = place.optional_bool(record, "outcome_correct")
    error = record.get("first_error")
    if error is not None and (isinstance(error, bool) or not isinstance(error, int)):
        place.refuse("first_error", "an integer or null", error)
    return (
        StepExample(
            id=str(place.name(record, "id")),
            question=place.text(record["question"], "question"),
            images=place.images(record, "image", "images"),
            steps=labelled_steps(record, "steps", "labels", place, _FIRST_ERROR_SIGNS),
            correct=correct,
            group=place.name(record, "group"),
            extra=extra_of(record, used),
        ),
    )
