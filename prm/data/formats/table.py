"""The list of data formats, and the detection of a record's format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prm.data import records
from prm.data.formats import (
    candidates,
    dreamprm,
    first_error,
    judged,
    marked,
    messages,
    rollouts,
    stepwise,
    visualprm,
)
from prm.data.formats.agreement import agree
from prm.data.record_fields import Location, Words
from prm.names import FORMAT_NAMES, FormatName
from prm.schema import StepExample

UNKNOWN = "a record of a known format"
"""What the error of a record of no format begins with."""
_BRACKET = re.compile(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}")


@dataclass(frozen=True)
class Format:
    """A data format.

    Attributes:
        name: Its name on the command line.
        keys: The keys of its records, for messages.
        matches: Tells whether a record looks like this format.
        read: Returns the examples of a record, or raises ``DataError``.
        labels: Fields that may hold the labels of its steps, the one that is read first; None in a
            format without labels, or with several solutions a record.
    """

    name: FormatName
    keys: str
    matches: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], Location], tuple[StepExample, ...]]
    labels: tuple[str, ...] | None = None

    def examples(self, record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
        """Return the examples of a record.

        Raises:
            DataError: A field is wrong, or contradicts another one; the error names them.
        """
        examples = self.read(record, location)
        if len(examples) == 1:
            agree(record, examples[0], self.labels, location)
        return examples


def _matches_own(record: Mapping[str, Any]) -> bool:
    steps = record.get("steps")
    texts = isinstance(steps, list) and bool(steps) and isinstance(steps[0], str)
    other = "puzzle" in record or "mistake_index" in record
    return "steps" in record and not texts and not other


def _read_own(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    return (records.parse(record, location),)


FORMATS: tuple[Format, ...] = (
    Format(
        "prm-jsonl", "id, question, steps: [{text, label}]", _matches_own, _read_own, ("steps",)
    ),
    Format(
        "visualprm",
        "conversations: [{from, value}]",
        visualprm.matches,
        visualprm.read,
        ("conversations",),
    ),
    Format(
        "visualprm-raw",
        "question, steps_with_score: [{step, score, num_mc_correct, num_mc_total}]",
        rollouts.matches_visualprm_raw,
        rollouts.read_visualprm_raw,
        ("steps_with_score",),
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
        ("accuracy",),
    ),
    Format("dreamprm-meta", "input, true_false", dreamprm.matches_meta, dreamprm.read_meta),
    Format("stepwise", "prompt, completions, labels", stepwise.matches, stepwise.read, ("labels",)),
    Format(
        "messages", "messages: [{role, content}]", messages.matches, messages.read, ("messages",)
    ),
    Format(
        "processbench",
        "id, problem, steps: [text], label",
        first_error.matches_processbench,
        first_error.read_processbench,
        ("label",),
    ),
    Format(
        "visualprocessbench",
        "question, response: {steps, process_correctness}",
        judged.matches_visualprocessbench,
        judged.read_visualprocessbench,
        ("response",),
    ),
    Format(
        "mathcheck",
        "id, question, steps: [text], labels",
        first_error.matches_mathcheck,
        first_error.read_mathcheck,
        ("labels",),
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
    Format(
        "math-shepherd",
        "input, label: text, task",
        marked.matches_math_shepherd,
        marked.read_math_shepherd,
        ("label",),
    ),
    Format(
        "openrlhf",
        "input or text, value: [label]",
        marked.matches_openrlhf,
        marked.read_openrlhf,
        marked.VALUES,
    ),
    Format(
        "openr",
        "question, process, labels",
        marked.matches_openr,
        marked.read_openr,
        ("labels", "label"),
    ),
    Format(
        "mm-prm",
        "conversations: [{from: human, value}, {from: gpt, value: [label]}]",
        marked.matches_mm_prm,
        marked.read_mm_prm,
        ("conversations",),
    ),
    Format(
        "rlhflow",
        "conversations: [{role, content}]",
        messages.matches_rlhflow,
        messages.read_rlhflow,
        ("conversations",),
    ),
    Format(
        "rlhflow-candidates",
        "prompt, answers: [text], labels: [1 or 0]",
        candidates.matches_rlhflow,
        candidates.read_rlhflow,
    ),
    Format(
        "math-aps",
        "question, final_answer, reasoning_steps",
        rollouts.matches_math_aps,
        rollouts.read_math_aps,
    ),
    Format(
        "prm800k",
        "question: {problem}, label: {steps}",
        judged.matches_prm800k,
        judged.read_prm800k,
    ),
    Format(
        "prmbench",
        "modified_question, modified_process, error_steps",
        judged.matches_prmbench,
        judged.read_prmbench,
        ("error_steps",),
    ),
    Format(
        "mr-ben",
        "Question, Model_Solution_Steps, Model_Solution_Correctness, "
        "Model_Solution_First_Error_Step",
        first_error.matches_mr_ben,
        first_error.read_mr_ben,
        ("Model_Solution_First_Error_Step",),
    ),
    Format(
        "big-bench-mistake",
        "input, steps: [text], mistake_index, target",
        first_error.matches_big_bench_mistake,
        first_error.read_big_bench_mistake,
        ("mistake_index",),
    ),
    Format(
        "mathcheck-checklist",
        "task_type, question_type, question, solution, answer",
        first_error.matches_mathcheck_checklist,
        first_error.read_mathcheck_checklist,
    ),
    Format(
        "math-vision",
        "id, model, response, model_answer, correct",
        candidates.matches_math_vision,
        candidates.read_math_vision,
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

    The error of a record of no format lists them all, and names the nearest one and the fields that
    the record lacks for it.

    Raises:
        DataError: The record looks like no format, or like several, which the message lists.
    """
    if not isinstance(record, dict):
        location.refuse(None, "a JSON object", record, "write one object per row")
    matching = [format for format in FORMATS if format.matches(record)]
    if len(matching) == 1:
        return matching[0]
    keys = Words(_shown_keys(record))
    if matching:
        names = [format.name for format in matching]
        location.refuse(
            None,
            f"a record of one format; this one can be {' or '.join(names)}",
            keys,
            f"name the format ({', '.join(names)}), or remove the keys of the others",
        )
    known = "; ".join(f"{format.name} ({format.keys})" for format in FORMATS)
    location.refuse(None, f"{UNKNOWN}: {known}", keys, _advice(record))


def _shown_keys(record: Mapping[str, Any]) -> str:
    """Return the keys of a record, and those of the objects that its lists hold."""
    if not record:
        return "the keys of an empty object"
    shown = "the keys " + ", ".join(map(repr, list(record)[:12]))
    for key, held in list(record.items())[:12]:
        if isinstance(held, list) and held and isinstance(held[0], dict):
            inner = ", ".join(map(repr, list(held[0])[:6]))
            shown += f"; {key!r} holds {len(held):,} objects with {inner or 'no key'}"
    return shown


def _advice(record: Mapping[str, Any]) -> str:
    """Name the format with most of its fields in the record, and the fields that are missing."""
    fields = {format.name: _top_level(format.keys) for format in FORMATS}
    there = {name: len(keys & record.keys()) for name, keys in fields.items()}
    best = max(there, key=lambda name: (there[name], -len(fields[name])))
    missing = sorted(fields[best] - record.keys())
    if 2 * there[best] < len(fields[best]) or not missing:
        return "rename keys or convert"
    return f"rename keys or convert; {best} is nearest, and lacks {', '.join(map(repr, missing))}"


def _top_level(keys: str) -> set[str]:
    """Return the names in ``Format.keys`` that stand in no bracket and are no alternative."""
    plain = keys
    while (inner := _BRACKET.sub("", plain)) != plain:
        plain = inner
    return {part.partition(":")[0].strip() for part in plain.split(",") if " or " not in part}
