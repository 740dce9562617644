"""One record of the JSONL contract, checked field by field, to a ``StepExample`` and back."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from prm.schema import DataError, Step, StepExample

FIELDS = ("id", "question", "images", "steps", "domain", "answer", "correct", "group")
STEP_FIELDS = ("text", "label")
_NEAR = 0.8
_LABELS = '"+", "-", a number in [0, 1] or null'


def parse_record(
    record: Any, image_root: Path, *, file: Path | None = None, line: int | None = None
) -> StepExample:
    """Check a decoded JSON value and make an example of it.

    Image paths are taken relative to ``image_root``; whether they exist is the reader's business.

    Raises:
        DataError: naming ``file``, ``line`` and the field at fault.
    """

    def fail(field: str | None, expected: str, found: Any, remedy: str | None = None) -> NoReturn:
        raise DataError(
            expected=expected,
            found=found if isinstance(found, _Words) else describe(found),
            file=file,
            line=line,
            field=field,
            remedy=remedy,
        )

    if not isinstance(record, dict):
        fail(None, "a JSON object", record, "write one object per line")
    _check_keys(record, FIELDS, "", fail, extra_allowed=True)
    for name in ("id", "question", "steps"):
        if name not in record:
            fail(name, f"the field {name!r}", _Words("nothing"))
    return StepExample(
        id=_text(record["id"], "id", fail),
        question=_text(record["question"], "question", fail),
        images=_images(record.get("images"), image_root, fail),
        steps=_steps(record["steps"], fail),
        domain=_optional_text(record, "domain", fail),
        answer=_optional_text(record, "answer", fail, blank=True),
        correct=_optional_bool(record, "correct", fail),
        group=_optional_text(record, "group", fail),
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
        "images": [_relative(image, image_root) for image in example.images],
        "steps": [{"text": step.text, "label": _sign(step.label)} for step in example.steps],
        **{name: value for name, value in optional.items() if value is not None},
        **example.extra,
    }


def describe(value: Any) -> str:
    """``value`` in a few words, for a message: its JSON kind and, if short, itself."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {str: "the string", dict: "an object", list: "a list"}
    kind = next((word for type_, word in kinds.items() if isinstance(value, type_)), "the number")
    if isinstance(value, dict | list):
        return f"{kind} of {len(value)}" if value else f"an empty {kind.split()[-1]}"
    shown = repr(value)
    return f"{kind} {shown if len(shown) <= 60 else shown[:57] + '...'}"


class _Words(str):
    """Text that goes into a message as it is."""


_Fail = Callable[..., NoReturn]


def _check_keys(
    record: Mapping[str, Any],
    known: tuple[str, ...],
    prefix: str,
    fail: _Fail,
    *,
    extra_allowed: bool,
) -> None:
    for key in record:
        if key in known:
            continue
        near = next((name for name in known if name == key.strip().lower()), None)
        if near is None and len(key) > 3:
            near = next(iter(difflib.get_close_matches(key.lower(), known, 1, _NEAR)), None)
        if near is not None:
            fail(prefix + key, f"the field {near!r}", _Words(repr(key)), f"rename it to {near!r}")
        if not extra_allowed:
            names = " and ".join(repr(name) for name in known)
            fail(
                prefix + key,
                f"only {names} in a step",
                _Words(repr(key)),
                "move it out of the step; other keys are kept at the top level of a record",
            )


def _text(value: Any, field: str, fail: _Fail, *, blank: bool = False) -> str:
    if not isinstance(value, str):
        fail(field, "a string", value)
    if not blank and not value.strip():
        fail(field, "a string that is not blank", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        fail(field, "text that UTF-8 can hold", _Words(f"a lone surrogate in {ascii(value)[:60]}"))
    return value


def _optional_text(
    record: Mapping[str, Any], field: str, fail: _Fail, *, blank: bool = False
) -> str | None:
    value = record.get(field)
    return None if value is None else _text(value, field, fail, blank=blank)


def _optional_bool(record: Mapping[str, Any], field: str, fail: _Fail) -> bool | None:
    value = record.get(field)
    if value is not None and not isinstance(value, bool):
        fail(field, "true, false or null", value)
    return value


def _images(value: Any, image_root: Path, fail: _Fail) -> tuple[Path, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        fail("images", "a list of paths", value, "write one image as a list of one path")
    return tuple(
        image_root / _text(path, f"images[{place}]", fail) for place, path in enumerate(value)
    )


def _steps(value: Any, fail: _Fail) -> tuple[Step, ...]:
    if not isinstance(value, list):
        fail("steps", "a list of steps", value)
    if not value:
        fail("steps", "at least one step", value, "remove the record or give it steps")
    steps = []
    for place, step in enumerate(value):
        field = f"steps[{place}]"
        if not isinstance(step, dict):
            fail(field, 'an object such as {"text": ..., "label": "+"}', step)
        _check_keys(step, STEP_FIELDS, f"{field}.", fail, extra_allowed=False)
        if "text" not in step:
            fail(f"{field}.text", "the field 'text'", _Words("nothing"))
        text = _text(step["text"], f"{field}.text", fail)
        steps.append(Step(text, _label(step.get("label"), f"{field}.label", fail)))
    return tuple(steps)


def _label(value: Any, field: str, fail: _Fail) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value not in ("+", "-"):
            fail(field, _LABELS, value)
        return float(value == "+")
    if isinstance(value, bool) or not isinstance(value, int | float):
        fail(field, _LABELS, value)
    if not (math.isfinite(value) and 0 <= value <= 1):
        fail(field, _LABELS, value)
    return float(value)


def _sign(label: float | None) -> str | float | None:
    return {1.0: "+", 0.0: "-"}.get(label, label) if label is not None else None


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
