"""Step benchmarks, which label the first wrong step of a solution, or every step.

- ``processbench``: ``{"id", "generator", "problem", "steps", "final_answer_correct", "label"}``.
  ``label`` is the index of the first wrong step, or -1: the steps before it are right, and those
  after it were not judged. The domain is the subset that the id starts with (``gsm8k-12``).
- ``visualprocessbench``: ``{"image", "question", "answer", "response": {"steps",
  "process_correctness"}, "policy_model", "data_source"}``. 1 means right, -1 wrong, and 0 neutral
  (no label).
- ``mathcheck``: ``{"id", "group", "question", "image", "steps", "labels", "first_error",
  "outcome_correct"}``. 1 means right, 0 wrong, and -1 after the first mistake (no label).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prm.data.formats.stepwise import labelled_steps
from prm.data.formats.turns import question_text
from prm.data.record_fields import Location, extra_of
from prm.schema import Step, StepExample

_NEUTRAL_SIGNS = {1: 1.0, -1: 0.0, 0: None}
_FIRST_ERROR_SIGNS = {1: 1.0, 0: 0.0, -1: None}


def matches_processbench(record: Mapping[str, Any]) -> bool:
    """Whether the record is a problem with steps and the index of the first mistake."""
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
    right = len(texts) if error == -1 else error
    steps = tuple(
        Step(
            location.text(text, f"steps[{number}]"),
            1.0 if number < right else 0.0 if number == right else None,
        )
        for number, text in enumerate(texts)
    )
    name = str(location.name(record, "id"))
    subset, dash, _ = name.rpartition("-")
    return (
        StepExample(
            id=name,
            question=location.text(record["problem"], "problem"),
            images=(),
            steps=steps,
            domain=subset if dash and subset else None,
            correct=location.optional_bool(record, "final_answer_correct"),
            extra=extra_of(record, ("id", "problem", "steps", "final_answer_correct")),
        ),
    )


def read_visualprocessbench(
    record: Mapping[str, Any], location: Location
) -> tuple[StepExample, ...]:
    """Return the example of a VisualProcessBench row.

    Raises:
        DataError: A field is wrong; the error names it (``response.process_correctness[2]``).
    """
    location.need(record, "question", "response")
    response = record["response"]
    if not isinstance(response, dict):
        location.refuse("response", 'an object with "steps" and "process_correctness"', response)
    fields = {f"response.{name}": value for name, value in response.items()}
    location.need(fields, "response.steps", "response.process_correctness")
    images = location.images(record, "image", "images")
    question = question_text(record, "question", len(images), location)
    steps = labelled_steps(
        fields, "response.steps", "response.process_correctness", location, _NEUTRAL_SIGNS
    )
    used = ("id", "question", "image", "images", "response", "data_source", "answer")
    return (
        StepExample(
            id=location.own_id(record, (question, *(step.text for step in steps))),
            question=question,
            images=images,
            steps=steps,
            domain=location.name(record, "data_source"),
            extra=extra_of(record, used, reference_answer=record.get("answer")),
        ),
    )


def read_mathcheck(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a MathCheck row.

    Raises:
        DataError: A field is wrong; the error names it (``labels[2]``).
    """
    location.need(record, "id", "question", "steps", "labels")
    used = ("id", "question", "image", "images", "steps", "labels", "group", "outcome_correct")
    correct = location.optional_bool(record, "outcome_correct")
    error = record.get("first_error")
    if error is not None and (isinstance(error, bool) or not isinstance(error, int)):
        location.refuse("first_error", "an integer or null", error)
    return (
        StepExample(
            id=str(location.name(record, "id")),
            question=location.text(record["question"], "question"),
            images=location.images(record, "image", "images"),
            steps=labelled_steps(record, "steps", "labels", location, _FIRST_ERROR_SIGNS),
            correct=correct,
            group=location.name(record, "group"),
            extra=extra_of(record, used),
        ),
    )
