"""``prompt`` / ``completions`` / ``labels`` rows: TRL's stepwise supervision, optional ``images``.

``{"prompt": text, "completions": [step, ...], "labels": [true | 0.7 | null | ..., ...]}``, and
optionally ``id``, ``images``, ``domain``, ``group``, ``answer`` and ``correct``. A row without an
id receives one. ``prm.data.stepwise_writer`` writes these rows, with a weight for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prm.data.formats.turns import question_text
from prm.data.record_fields import Location, Words, extra_of
from prm.schema import Step, StepExample

_USED = ("id", "prompt", "completions", "labels", "images", "image", "domain", "group")


def matches(record: Mapping[str, Any]) -> bool:
    """Whether the record has completions."""
    return "completions" in record


def read(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a record.

    Raises:
        DataError: A field is wrong; the error names it (``labels[3]``).
    """
    location.need(record, "prompt", "completions", "labels")
    images = location.images(record, "images", "image")
    question = question_text(record, "prompt", len(images), location)
    steps = labelled_steps(record, "completions", "labels", location)
    return (
        StepExample(
            id=location.own_id(record, (question, *(step.text for step in steps))),
            question=question,
            images=images,
            steps=steps,
            domain=location.name(record, "domain"),
            answer=location.optional_text(record, "answer", blank=True),
            correct=location.optional_bool(record, "correct"),
            group=location.name(record, "group"),
            extra=extra_of(record, (*_USED, "answer", "correct")),
        ),
    )


def labelled_steps(
    record: Mapping[str, Any],
    texts: str,
    labels: str,
    location: Location,
    signs: Mapping[int | str, float | None] | None = None,
) -> tuple[Step, ...]:
    """Pair the step texts and the labels of two lists of the same length.

    Args:
        record: The record that holds the lists.
        texts: Field of the list of step texts.
        labels: Field of the list of labels; if it is null, no step has a label.
        location: The location of the record.
        signs: Meaning of the labels, integers or signs. None: the labels are those that
            ``Location.label`` reads.
    """
    step_texts = location.listed(record[texts], texts, "steps")
    judged = record.get(labels)
    if judged is None:
        judged = [None] * len(step_texts)
    elif not isinstance(judged, list):
        location.refuse(labels, "a list of labels", judged)
    if len(judged) != len(step_texts):
        lengths = Words(f"{len(judged)} for {len(step_texts)} steps")
        location.refuse(labels, "as many labels as steps", lengths)
    steps = []
    for number, (text, label) in enumerate(zip(step_texts, judged, strict=True)):
        step = location.step(text, f"{texts}[{number}]")
        field = f"{labels}[{number}]"
        if signs is None:
            steps.append(Step(step, location.label(label, field, boolean=True)))
        elif label is None:
            steps.append(Step(step))
        elif isinstance(label, bool) or not isinstance(label, int | str) or label not in signs:
            location.refuse(field, f"one of {', '.join(map(str, signs))} or null", label)
        else:
            steps.append(Step(step, signs[label]))
    return tuple(steps)
