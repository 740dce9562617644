"""The list of data formats, and the detection of a record's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prm.data import records
from prm.data.formats import (
    benchmarks,
    candidates,
    dreamprm,
    messages,
    stepwise,
    visualprm,
    visualprm_raw,
)
from prm.data.record_fields import Location, Words
from prm.names import FORMAT_NAMES, FormatName
from prm.schema import StepExample


@dataclass(frozen=True)
class Format:
    """A data format.

    Attributes:
        name: Its name on the command line.
        keys: The keys of its records, for messages.
        matches: Tells whether a record looks like this format.
        read: Returns the examples of a record, or raises ``DataError``.
    """

    name: FormatName
    keys: str
    matches: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], Location], tuple[StepExample, ...]]


def _matches_own(record: Mapping[str, Any]) -> bool:
    steps = record.get("steps")
    texts = isinstance(steps, list) and bool(steps) and isinstance(steps[0], str)
    return "steps" in record and not texts and "puzzle" not in record


def _read_own(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    return (records.parse(record, location),)


FORMATS: tuple[Format, ...] = (
    Format("prm-jsonl", "id, question, steps: [{text, label}]", _matches_own, _read_own),
    Format("visualprm", "conversations: [{from, value}]", visualprm.matches, visualprm.read),
    Format(
        "visualprm-raw",
        "question, steps_with_score: [{step, score, num_mc_correct, num_mc_total}]",
        visualprm_raw.matches,
        visualprm_raw.read,
    ),
    Format(
        "dreamprm-test",
        "question, candidates: [text], true_false: [bool]",
        candidates.matches_test,
        candidates.read_test,
    ),
    Format(
        "dreamprm-train",
        "input, add, accuracy",
        dreamprm.matches_train,
        dreamprm.read_train,
    ),
    Format("dreamprm-meta", "input, true_false", dreamprm.matches_meta, dreamprm.read_meta),
    Format("stepwise", "prompt, completions, labels", stepwise.matches, stepwise.read),
    Format("messages", "messages: [{role, content}]", messages.matches, messages.read),
    Format(
        "processbench",
        "id, problem, steps: [text], label",
        benchmarks.matches_processbench,
        benchmarks.read_processbench,
    ),
    Format(
        "visualprocessbench",
        "question, response: {steps, process_correctness}",
        benchmarks.matches_visualprocessbench,
        benchmarks.read_visualprocessbench,
    ),
    Format(
        "mathcheck",
        "id, question, steps: [text], labels",
        benchmarks.matches_mathcheck,
        benchmarks.read_mathcheck,
    ),
    Format(
        "mathcheck-candidates",
        "id, question, candidates: [{response, auto_correct}]",
        candidates.matches_mathcheck,
        candidates.read_mathcheck,
    ),
    Format(
        "game24",
        "idx, puzzle, candidates: [{steps, correct}]",
        candidates.matches_game24,
        candidates.read_game24,
    ),
)


def format_named(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ValueError: There is no such format.
    """
    for format in FORMATS:
        if format.name == name:
            return format
    raise ValueError(f"expected a format among {', '.join(FORMAT_NAMES)}, found {name!r}")


def detect(record: object, location: Location) -> Format:
    """Return the one format that a record looks like.

    Raises:
        DataError: The record looks like no format, or like several, which the message lists.
    """
    if not isinstance(record, dict):
        location.refuse(None, "a JSON object", record, "write one object per row")
    matching = [format for format in FORMATS if format.matches(record)]
    if len(matching) == 1:
        return matching[0]
    keys = Words("the keys " + (", ".join(map(repr, list(record)[:12])) or "of an empty object"))
    if matching:
        names = [format.name for format in matching]
        location.refuse(
            None,
            f"a record of one format; this one can be {' or '.join(names)}",
            keys,
            f"name the format ({', '.join(names)}), or remove the keys of the others",
        )
    known = "; ".join(f"{format.name} ({format.keys})" for format in FORMATS)
    location.refuse(None, f"a record of a known format: {known}", keys, "rename keys or convert")
