"""Convert a record of the JSONL contract, checked field by field, to a ``StepExample`` and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prm.data.record_fields import FIELDS, Location, Words, near_field
from prm.data_urls import is_embedded, to_url
from prm.schema import Step, StepExample

STEP_FIELDS = ("text", "label")


def parse(record: object, location: Location) -> StepExample:
    """Check a decoded JSON value and convert it to an example.

    The reader checks whether the images exist, and whether other fields contradict the labels.

    Raises:
        DataError: A field is wrong; the error names file, line and the field.
    """
    if not isinstance(record, dict):
        location.refuse(None, "a JSON object", record, "write one object per line")
    _check_keys(record, FIELDS, "", location, extra_allowed=True)
    location.need(record, "id", "question", "steps")
    steps = _steps(record["steps"], location)
    return StepExample(
        id=location.text(record["id"], "id"),
        question=location.text(record["question"], "question"),
        images=_images(record.get("images"), location),
        steps=steps,
        domain=location.optional_text(record, "domain"),
        answer=location.optional_text(record, "answer", blank=True),
        correct=location.optional_bool(record, "correct"),
        group=location.optional_text(record, "group"),
        extra={key: value for key, value in record.items() if key not in FIELDS},
    )


def to_record(example: StepExample, image_root: Path) -> dict[str, Any]:
    """Return the JSON object of an example.

    Labels 1 and 0 become "+" and "-", and absent fields are left out. Images below ``image_root``
    are written relative to it, others as they are.
    """
    optional = {
        "domain": example.domain,
        "answer": example.answer,
        "correct": example.correct,
        "group": example.group,
    }
    return {
        "id": example.id,
        "question": example.question,
        "images": [relative(image, image_root) for image in example.images],
        "steps": [{"text": step.text, "label": _sign(step.label)} for step in example.steps],
        **{name: value for name, value in optional.items() if value is not None},
        **example.extra,
    }


def relative(path: Path, root: Path) -> str:
    """Return ``path`` in the form in which a file with images below ``root`` holds it."""
    if is_embedded(path):
        return to_url(path)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _check_keys(
    record: Mapping[str, Any],
    known: tuple[str, ...],
    prefix: str,
    location: Location,
    *,
    extra_allowed: bool,
) -> None:
    for key in record:
        if key in known:
            continue
        near = near_field(key, known)
        if near is not None:
            remedy = f"rename it to {near!r}"
            location.refuse(prefix + key, f"the field {near!r}", Words(repr(key)), remedy)
        if not extra_allowed:
            names = " and ".join(repr(name) for name in known)
            location.refuse(
                prefix + key,
                f"only {names} in a step",
                Words(repr(key)),
                "move it out of the step; other keys are kept at the top level of a record",
            )


def _images(value: object, location: Location) -> tuple[Path, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        location.refuse("images", "a list of paths", value, "write one image as a list of one path")
    return tuple(location.image(path, f"images[{number}]") for number, path in enumerate(value))


def _steps(value: object, location: Location) -> tuple[Step, ...]:
    records = location.listed(value, "steps", "steps", "remove the record or give it steps")
    steps = []
    for number, step in enumerate(records):
        field = f"steps[{number}]"
        if not isinstance(step, dict):
            location.refuse(field, 'an object such as {"text": ..., "label": "+"}', step)
        _check_keys(step, STEP_FIELDS, f"{field}.", location, extra_allowed=False)
        if "text" not in step:
            location.refuse(f"{field}.text", "the field 'text'", Words("nothing"))
        text = location.text(step["text"], f"{field}.text")
        steps.append(Step(text, location.label(step.get("label"), f"{field}.label")))
    return tuple(steps)


def _sign(label: float | None) -> str | float | None:
    return {1.0: "+", 0.0: "-"}.get(label, label) if label is not None else None
