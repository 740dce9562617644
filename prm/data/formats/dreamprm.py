"""DreamPRM 1.0: solution prefixes with Monte Carlo accuracy (train) and whole solutions (meta).

- Train: ``{"id", "sid", "input", "add", "image_path", "dataset", "accuracy", "score", "times"}``.
  ``add`` holds the steps up to number ``sid``; ``accuracy`` (= score / times) is the share of its
  completions that reached the right answer. It labels the last step of the example; the steps
  before it have no label.
- Meta: ``{"id", "input", "image_path", "true_false"}``. ``input`` holds the question and, from
  "Step 1" on, the solution. A row without steps is an error (the published file has such rows; the
  published code divides by their number).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prm.data.formats.agreement import agree_with_counts
from prm.data.record_fields import Location, domain_key, extra_of
from prm.data.splitter import solution_steps
from prm.evaluation.final_answer import final_answer
from prm.schema import Step, StepExample

_FIRST_STEP = re.compile(r"^[ \t]*(?:#{1,6}[ \t]*)?\*{0,2}Step[ \t]*1\b", re.I | re.M)
_USED = ("id", "input", "image_path", "group")


def matches_train(record: Mapping[str, Any]) -> bool:
    """Whether the record is a prefix with its accuracy."""
    return {"input", "add", "accuracy"} <= record.keys()


def matches_meta(record: Mapping[str, Any]) -> bool:
    """Whether the record has question and solution in one text, with true or false."""
    return {"input", "true_false"} <= record.keys()


def read_train(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a train row.

    Raises:
        DataError: A field is wrong; the error names it.
    """
    location.need(record, "input", "add", "accuracy")
    question = location.text(record["input"], "input")
    texts = solution_steps(location.text(record["add"], "add"))
    if not texts:
        location.refuse("add", "at least one step", record["add"])
    accuracy = location.label(record["accuracy"], "accuracy")
    if accuracy is None:
        location.refuse("accuracy", "a number in [0, 1]", None)
    score, times = record.get("score"), record.get("times")
    agree_with_counts(("accuracy", accuracy), ("score", score), ("times", times), location)
    raw = location.name(record, "id")
    sid = location.name(record, "sid")
    steps = (*(Step(text) for text in texts[:-1]), Step(texts[-1], accuracy))
    named = raw if sid is None or raw is None else f"{raw}-{sid}"
    return (
        StepExample(
            id=location.default_id(named, (question, *texts)),
            question=question,
            images=location.images(record, "image_path"),
            steps=steps,
            domain=location.name(record, domain_key(record)),
            group=location.name(record, "group") or raw,
            extra=extra_of(
                record,
                (*_USED, "add", "accuracy", domain_key(record)),
                trials=None if times is None else [*([None] * (len(steps) - 1)), times],
            ),
        ),
    )


def read_meta(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a meta row.

    Raises:
        DataError: A field is wrong; the error names it.
    """
    location.need(record, "input", "true_false")
    text = location.text(record["input"], "input")
    correct = location.optional_bool(record, "true_false")
    if correct is None:
        location.refuse("true_false", "true or false", None)
    first = _FIRST_STEP.search(text)
    if first is None or not text[: first.start()].strip():
        location.refuse(
            "input",
            'the question and, from a line that starts with "Step 1" on, the solution',
            text,
            "remove the row, or give it a solution",
        )
    question, solution = text[: first.start()].strip(), text[first.start() :]
    raw = location.name(record, "id")
    steps = solution_steps(solution)
    return (
        StepExample(
            id=location.default_id(raw, (question, *steps)),
            question=question,
            images=location.images(record, "image_path"),
            steps=tuple(Step(step) for step in steps),
            domain=location.name(record, domain_key(record)),
            answer=final_answer(solution) or "",
            correct=correct,
            group=location.name(record, "group") or raw,
            extra=extra_of(record, (*_USED, "true_false", domain_key(record))),
        ),
    )
