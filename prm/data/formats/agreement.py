"""What a row says twice has to agree: of two fields that contradict each other none is taken.

A format reads labels and outcomes from its own fields. Rows often have the same again under another
name, from a conversion or a second annotation, and which of the two is right nobody knows. What may
agree, because one of the two is soft or says nothing, is no contradiction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prm.data.record_fields import Location, Words, describe
from prm.schema import Step, StepExample

_LABELS = ("labels", "label")
_OUTCOMES = ("correct", "true_false", "outcome_correct", "final_answer_correct")
_SIDES: Mapping[Any, float | None] = {"+": 1.0, "-": 0.0, -1: None}
"""-1 is "wrong" to some and "not judged" to others, and so contradicts nothing."""
_ONE_SOURCE = "leave one of the two out, or correct it"
_ROUNDED = 0.01
"""How far two soft labels may be apart that are the same number, rounded."""
_SHOWN = 60


def agree(
    record: Mapping[str, Any],
    example: StepExample,
    sources: Sequence[str] | None,
    location: Location,
) -> None:
    """Refuse a record of one example in which other fields contradict what was read.

    Args:
        record: The record.
        example: What was read from it.
        sources: The fields that may hold the labels of the steps; the first present one was read.
            None: the format has no labels of steps.
        location: The location of the record.

    Raises:
        DataError: A list of labels, ``first_error`` or an outcome contradicts the example. The
            error names both fields and what they say.
    """
    if sources is not None:
        source = next((name for name in sources if name in record), sources[0])
        for name in dict.fromkeys((*sources, *_LABELS)):
            if name != source:
                _compare_labels(record, name, source, example.steps, location)
        _compare_first_error(record, example.steps, location)
    if example.correct is not None:
        given = {name: held for name in _OUTCOMES if isinstance(held := record.get(name), bool)}
        read = next((n for n, held in given.items() if held is example.correct), "the other fields")
        for name, held in given.items():
            if held is not example.correct:
                expected = f"the outcome of {read!r}, {describe(example.correct)}"
                location.refuse(name, expected, held, _ONE_SOURCE)


def one_of(record: Mapping[str, Any], names: Sequence[str], location: Location) -> str:
    """Return the first of several names of a field that a record has, or the first of all.

    Raises:
        DataError: The record has two of them, which hold different values.
    """
    name = next((name for name in names if name in record), names[0])
    for other in names:
        if record.get(other) is not None and record[other] != record[name]:
            expected = f"what {name!r} holds, {_shown(record[name])}"
            location.refuse(other, expected, Words(_shown(record[other])), _ONE_SOURCE)
    return name


def agree_with_counts(
    share: tuple[str, object], right: tuple[str, object], total: tuple[str, object], at: Location
) -> None:
    """Refuse a share that is not right / total, rounded to the nearest count.

    Args:
        share: Name and value of the field of the share; each is compared if all are numbers.
        right: Name and value of the count of those that are right.
        total: Name and value of the count of all.
        at: The location of the record.

    Raises:
        DataError: share * total is half a count or more from right.
    """
    values = [value for _, value in (share, right, total)]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in values):
        return
    part, counted, every = values
    try:
        off = abs(part * every - counted)  # type: ignore[operator]
    except OverflowError:  # an integer beyond all floats counts nothing
        off = math.inf
    if every > 0 and off >= 0.5:  # type: ignore[operator]
        expected = f"{right[0]} / {total[0]}, {_shown(counted)} / {_shown(every)}"
        at.refuse(share[0], expected, part, _ONE_SOURCE)


def _compare_labels(
    record: Mapping[str, Any], name: str, source: str, steps: Sequence[Step], location: Location
) -> None:
    """Refuse a list of labels that contradicts those of the steps, or would be lost."""
    given = record.get(name)
    if not isinstance(given, list) or not given or not all(map(_is_label, given)):
        return
    if len(given) != len(steps):
        lengths = Words(f"{len(given)} for {len(steps)} steps")
        location.refuse(name, "as many labels as steps", lengths, _ONE_SOURCE)
    own = [step.label for step in steps]
    if all(label is None for label in own) and any(label is not None for label in given):
        found = Words("labels beside it, which would not be read")
        location.refuse(name, f"the labels of the steps in {source!r}", found, _ONE_SOURCE)
    for number, (label, other) in enumerate(zip(own, given, strict=True)):
        if _differ(label, _SIDES.get(other, other)):
            sign = {1.0: "'+'", 0.0: "'-'"}.get(label, label)  # type: ignore[arg-type]
            expected = f"the label of step {number + 1} by {source!r}, {sign}"
            location.refuse(f"{name}[{number}]", expected, other, _ONE_SOURCE)


def _differ(label: float | None, other: float | None) -> bool:
    """Whether two labels exclude each other: right and wrong, or two different probabilities.

    A probability and a plain label do not: some count a step as right from one right rollout on.
    """
    if label is None or other is None or (label in (0, 1)) != (other in (0, 1)):
        return False
    return abs(label - other) > _ROUNDED


def _is_label(value: object) -> bool:
    if value is None or value in ("+", "-"):
        return True
    return isinstance(value, bool | int | float) and (value == -1 or 0 <= value <= 1)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _compare_first_error(
    record: Mapping[str, Any], steps: Sequence[Step], location: Location
) -> None:
    """Refuse a field ``first_error`` that contradicts the labels of the steps.

    It is the number of the first wrong step, counted from 1; 0, -1 or null if there is none. A step
    without a label, or with a soft one, contradicts nothing.
    """
    error = record.get("first_error")
    labels = [step.label for step in steps]
    if error is None or all(label is None for label in labels):
        return
    if isinstance(error, bool) or not isinstance(error, int) or not -1 <= error <= len(steps):
        expected = f"the number of the first wrong step, 1 to {len(steps)}, or 0 if none is wrong"
        location.refuse("first_error", expected, error)
    wrong = labels.index(0.0) + 1 if 0.0 in labels else 0
    none = error <= 0
    if (wrong and (none or wrong < error)) or (not none and labels[error - 1] == 1.0):
        first = f"step {wrong} is the first wrong one" if wrong else "no step is wrong"
        location.refuse(
            "first_error",
            "the number of the first wrong step by the labels, counted from 1, or 0 if none is",
            Words(f"first_error {error}, and labels in which {first}"),
            "correct one of the two, or rename 'first_error' if it means something else",
        )
