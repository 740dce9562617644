"""One record of the JSONL contract, checked field by field, to a ``StepExample`` and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prm.data.record_fields import FIELDS, Place, Words, near_field
from prm.schema import Step, StepExample

STEP_FIELDS = ("text", "label")


def parse_record(
    record: object, image_root: Path, *, file: Path | None = None, line: int | None = None
) -> StepExample:
    """Check a decoded JSON value and make an example of it.

    Image paths are taken relative to ``image_root``; whether they exist is the reader's business.

    Raises:
        DataError: A field is wrong; the error names ``file``, ``line`` and the field.
    """
    return parse(record, Place(image_root, file, line))


def parse(record: object, place: Place) -> StepExample:
    """As ``parse_record``."""
    if not isinstance(record, dict):
        place.refuse(None, "a JSON object", record, "write one object per line")
    _check_keys(record, FIELDS, "", place, extra_allowed=True)
    place.need(record, "id", "question", "steps")
    return StepExample(
        id=place.text(record["id"], "id"),
        question=place.text(record["question"], "question"),
        images=_images(record.get("images"), place),
        steps=_steps(record["steps"], place),
        domain=place.optional_text(record, "domain"),
        answer=place.optional_text(record, "answer", blank=True),
        correct=place.optional_bool(record, "correct"),
        group=place.optional_text(record, "group"),
        extra={key: value for key, value in record.items() if key not in FIELDS},
    )


def to_record(example: StepExample, image_root: Path) -> dict[str, Any]:
    """The JSON object of an example: "+" and "-" for labels 1 and 0, absent fields left out.

    Images below ``image_root`` are written relative to it, others as they are.
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
    """``path`` as it is written into a file whose images lie below ``root``."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _check_keys(
    record: Mapping[str, Any],
    known: tuple[str, ...],
    prefix: str,
    place: Place,
    *,
    extra_allowed: bool,
) -> None:
    for key in record:
        if key in known:
            continue
        near = near_field(key, known)
        if near is not None:
            remedy = f"rename it to {near!r}"
            place.refuse(prefix + key, f"the field {near!r}", Words(repr(key)), remedy)
        if not extra_allowed:
            names = " and ".join(repr(name) for name in known)
            place.refuse(
                prefix + key,
                f"only {names} in a step",
                Words(repr(key)),
                "move it out of the step; other keys are kept at the top level of a record",
            )


def _images(value: object, place: Place) -> tuple[Path, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        place.refuse("images", "a list of paths", value, "write one image as a list of one path")
    return tuple(place.image(path, f"images[{number}]") for number, path in enumerate(value))


def _steps(value: object, place: Place) -> tuple[Step, ...]:
    records = place.listed(value, "steps", "steps", "remove the record or give it steps")
    steps = []
    for number, step in enumerate(records):
        field = f"steps[{number}]"
        if not isinstance(step, dict):
            place.refuse(field, 'an object such as {"text": ..., "label": "+"}', step)
        _check_keys(step, STEP_FIELDS, f"{field}.", place, extra_allowed=False)
        if "text" not in step:
            place.refuse(f"{field}.text", "the field 'text'", Words("nothing"))
        text = place.text(step["text"], f"{field}.text")
        steps.append(Step(text, place.label(step.get("label"), f"{field}.label")))
    return tuple(steps)


def _sign(label: float | None) -> str | float | None:
    return {1.0: "+", 0.0: "-"}.get(label, label) if label is not None else None
