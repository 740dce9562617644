"""Rollouts of VisualPRM400K-v1.1-Raw: how many of the continuations of each step ended right.

``{"image", "question", "steps_with_score": [{"step", "score", "num_mc_correct",
"num_mc_total"}]}``. The label is K / N. Behind the first step without a right continuation nothing
was sampled (0 of 0): such steps have no label, where VisualPRM's converter writes "-". N stands in
``extra["trials"]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prm.data.formats.turns import question_text
from prm.data.record_fields import Place, Words, domain_key, extra_of
from prm.schema import Step, StepExample

_COUNTS = ("num_mc_correct", "num_mc_total")
_USED = ("id", "image", "images", "question", "steps_with_score", "group")


def matches(record: Mapping[str, Any]) -> bool:
    """Whether the record has steps with scores."""
    return "steps_with_score" in record


def read(record: Mapping[str, Any], place: Place) -> tuple[StepExample, ...]:
    """The example of a record.

    Raises:
        DataError: A field is wrong; the error names it (``steps_with_score[3].num_mc_total``).
    """
    place.need(record, "question", "steps_with_score")
    images = place.images(record, "image", "images")
    question = question_text(record, "question", len(images), place)
    steps, trials = [], []
    given = place.listed(record["steps_with_score"], "steps_with_score", "steps")
    for number, step in enumerate(given):
        field = f"steps_with_score[{number}]"
        if not isinstance(step, dict):
            place.refuse(field, 'an object such as {"step": ..., "score": 0.5}', step)
        if "step" not in step:
            place.refuse(f"{field}.step", "the field 'step'", Words("nothing"))
        if all(step.get(name) is not None for name in _COUNTS):
            counts = [step[name] for name in _COUNTS]
            label = place.label(counts, f"{field}.num_mc_correct")
            trials.append(counts[1])
        else:
            label = place.label(step.get("score"), f"{field}.score")
            trials.append(None)
        steps.append(Step(place.text(step["step"], f"{field}.step").strip(), label))
    return (
        StepExample(
            id=place.own_id(record, (question, *(step.text for step in steps))),
            question=question,
            images=images,
            steps=tuple(steps),
            domain=place.name(record, domain_key(record)),
            group=place.name(record, "group"),
            extra=extra_of(
                record,
                (*_USED, domain_key(record)),
                trials=trials if any(trials) else None,
            ),
        ),
    )
