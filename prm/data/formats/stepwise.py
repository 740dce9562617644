"""``prompt`` / ``completions`` / ``labels`` rows: TRL's stepwise supervision, optional ``images``.

``{"prompt": text, "completions": [step, ...], "labels": [true | 0.7 | null | ..., ...]}``, and
``id``, ``images``, ``domain``, ``group``, ``answer``, ``correct`` where there are such columns. A
row without an id gets one. ``prm.data.stepwise_writer`` writes these rows, with a weight for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prm.data.formats.turns import question_text
from prm.data.record_fields import Place, Words, extra_of
from prm.schema import Step, StepExample

_USED = ("id", "prompt", "completions", "labels", "images", "image", "domain", "group")


def matches(record: Mapping[str, Any]) -> bool:
    """Whether the record has completions in a list."""
    return "completions" in record


def read(record: Mapping[str, Any], place: Place) -> tuple[StepExample, ...]:
    """The example of a record.

    Raises:
        DataError: A field is wrong; the error names it (``labels[3]``).
    """
    place.need(record, "prompt", "completions", "labels")
    images = place.images(record, "images", "image")
    question = question_text(record, "prompt", len(images), place)
    steps = labelled_steps(record, "completions", "labels", place)
    return (
        StepExample(
            id=place.own_id(record, (question, *(step.text for step in steps))),
            question=question,
            images=images,
            steps=steps,
            domain=place.name(record, "domain"),
            answer=place.optional_text(record, "answer", blank=True),
            correct=place.optional_bool(record, "correct"),
            group=place.name(record, "group"),
            extra=extra_of(record, (*_USED, "answer", "correct")),
        ),
    )


def labelled_steps(
    record: Mapping[str, Any],
    texts: str,
    labels: str,
    place: Place,
    signs: Mapping[int, float | None] | None = None,
) -> tuple[Step, ...]:
    """Steps from two lists of the same length.

    Args:
        record: Holds the lists.
        texts: Field of the list of step texts.
        labels: Field of the list of labels; a list that is null leaves every step unjudged.
        place: Where the record stands.
        signs: Meaning of integer labels; None: probabilities and what ``Place.label`` takes.
    """
    step_texts = place.listed(record[texts], texts, "steps")
    judged = record.get(labels)
    if judged is None:
        judged = [None] * len(step_texts)
    elif not isinstance(judged, list):
        place.refuse(labels, "a list of labels", judged)
    if len(judged) != len(step_texts):
        lengths = Words(f"{len(judged)} for {len(step_texts)} steps")
        place.refuse(labels, "as many labels as steps", lengths)
    steps = []
    for number, (text, label) in enumerate(zip(step_texts, judged, strict=True)):
        step = place.text(text, f"{texts}[{number}]")
        field = f"{labels}[{number}]"
        if signs is None:
            steps.append(Step(step, place.label(label, field, boolean=True)))
        elif label is None:
            steps.append(Step(step))
        elif isinstance(label, bool) or not isinstance(label, int) or label not in signs:
            place.refuse(field, f"one of {', '.join(map(str, signs))} or null", label)
        else:
            steps.append(Step(step, signs[label]))
    return tuple(steps)
