"""The learned labels of a run: what ``labels.jsonl`` says of every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prm.data.json_rows import json_rows
from prm.digests import check_digest
from prm.schema import DataError
from recipes.run.files import LABELS


class MovedLabel(NamedTuple):
    """The given and the learned label of a step of an example; steps count from 1."""

    id: str
    step: int
    given: float
    learned: float

    @property
    def distance(self) -> float:
        """How far the label moved."""
        return abs(self.learned - self.given)

    @property
    def turned_over(self) -> bool:
        """Whether it is on the other side of 1/2 than the given one."""
        return (self.learned - 0.5) * (self.given - 0.5) < 0


StepLabels = tuple[list[float | None], list[float | None]]
"""The given and the learned label of every step of an example."""


def read_labels(path: Path) -> Mapping[str, StepLabels]:
    """Read a ``labels.jsonl``: by id the given and the learned label of every step.

    Raises:
        DataError: The file is damaged, or a line does not have an id and as many labels in [0, 1],
            or null, of either kind.
        OSError: The file cannot be read.
    """
    check_digest(path)
    found: dict[str, StepLabels] = {}
    for line, entry in json_rows(path):
        if isinstance(entry, DataError):
            raise entry
        fault = _fault(entry, found)
        if fault is not None:
            field, expected, value = fault
            raise DataError(
                expected=expected, found=repr(value)[:80], file=path, line=line, field=field
            )
        found[entry["id"]] = (entry["given"], entry["learned"])
    return found


def _fault(entry: Any, before: Mapping[str, object]) -> tuple[str | None, str, object] | None:
    """Return the field that is wrong, what was expected, and what is there; None if nothing is."""
    if not isinstance(entry, dict):
        return None, "an object with id, given and learned", entry
    if not isinstance(entry.get("id"), str) or entry["id"] in before:
        return "id", "an id that no other line has", entry.get("id")
    for name in ("given", "learned"):
        labels = entry.get(name)
        if not isinstance(labels, list) or not all(map(_is_label, labels)):
            return name, "a list of numbers in [0, 1] or null", labels
    given, learned = entry["given"], entry["learned"]
    if [one is None for one in given] != [one is None for one in learned]:
        return "learned", f"a label where one was given, {given}", learned
    return None


def _is_label(value: object) -> bool:
    if value is None:
        return True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= 1  # type: ignore[operator]


def run_labels(directory: Path) -> Mapping[str, StepLabels]:
    """Return the labels of a run by the ids of its examples; none if it did not learn labels.

    Raises:
        DataError: ``labels.jsonl`` is not as ``train`` wrote it.
    """
    path = directory / LABELS
    return read_labels(path) if path.is_file() else {}


def moved_labels(examples: Mapping[str, StepLabels]) -> list[MovedLabel]:
    """Return the labels of all steps that have one, those that moved most first."""

    def each() -> Iterator[MovedLabel]:
        for name, labels in examples.items():
            for step, (given, learned) in enumerate(zip(*labels, strict=True), start=1):
                if given is not None and learned is not None:
                    yield MovedLabel(name, step, given, learned)

    return sorted(each(), key=lambda label: -label.distance)
