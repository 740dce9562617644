"""Rollouts of VisualPRM400K-v1.1-Raw: how many continuations of each step ended right.

``{"image", "question", "steps_with_score": [{"step", "score", "num_mc_correct",
"num_mc_total"}]}``. The label is K / N. After the first step without a right continuation nothing
was sampled (0 of 0); such steps have no label, whereas VisualPRM's converter writes "-".
``extra["trials"]`` holds N.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prm.data.formats.turns import question_text
from prm.data.record_fields import Location, Words, domain_key, extra_of
from prm.schema import Step, StepExample

_COUNTS = ("num_mc_correct", "num_mc_total")
_USED = ("id", "image", "images", "question", "steps_with_score", "group")


def matches(record: Mapping[str, Any]) -> bool:
    """Whether the record has steps with scores."""
    return "steps_with_score" in record


def read(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a record.

    Raises:
        DataError: A field is wrong; the error names it (``steps_with_score[3].num_mc_total``).
    """
    location.need(record, "question", "steps_with_score")
    images = location.images(record, "image", "images")
    question = question_text(record, "question", len(images), location)
    steps, trials = [], []
    given = location.listed(record["steps_with_score"], "steps_with_score", "steps")
    for number, step in enumerate(given):
        field = f"steps_with_score[{number}]"
        if not isinstance(step, dict):
            location.refuse(field, 'an object such as {"step": ..., "score": 0.5}', step)
        if "step" not in step:
            location.refuse(f"{field}.step", "the field 'step'", Words("nothing"))
        if all(step.get(name) is not None for name in _COUNTS):
            counts = [step[name] for name in _COUNTS]
            label = location.label(counts, f"{field}.num_mc_correct")
            trials.append(counts[1])
        else:
            label = location.label(step.get("score"), f"{field}.score")
            trials.append(None)
        steps.append(Step(location.text(step["step"], f"{field}.step").strip(), label))
    return (
        StepExample(
            id=location.own_id(record, (question, *(step.text for step in steps))),
            question=question,
            images=images,
            steps=tuple(steps),
            domain=location.name(record, domain_key(record)),
            group=location.name(record, "group"),
            extra=extra_of(
                record,
                (*_USED, domain_key(record)),
                trials=trials if any(trials) else None,
            ),
        ),
    )
