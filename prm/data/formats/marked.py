"""Texts with a mark behind every step, and the labels of the marks.

- ``math-shepherd``: ``{"input", "label", "task"}``. ``input`` holds the question, from "Step 1:" on
  the solution, and the mark "ки" behind every step; ``label`` is the same text with "+" or "-" in
  place of every mark. ``task`` is the domain. A few published rows have a mark in the question,
  which is dropped with its label (``extra["marks_in_question"]``), or no "Step 1:"; their question
  ends at its question mark (``extra["question_end"]``; see ``turns.opening_question``).
- ``openrlhf`` (OpenRLHF, ER-PRM): ``{"input" or "text", "value": [label, ...]}``, a text like
  Math-Shepherd's and a label for every mark: "+", "-" or a number in [0, 1]. A list written as JSON
  text is read, too.
- ``openr`` (openr, MATH-APS as published, MM-PRM's tree search): ``{"question", "process", "label"
  or "labels"}``; ``process`` has a mark behind every step.
- ``mm-prm``: ``{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt",
  "value": [label, ...]}]}``, where the human's turn is "Question: ...", "Process: ..." with marks.

The marks are "ки", "<prm>", "<extra_0>" and five line ends; a text has one kind. A last step
without a mark is a step as well: without a label in Math-Shepherd, with the last label elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prm.data.formats.agreement import one_of
from prm.data.formats.turns import cut_question, drop_placeholders, opening_question
from prm.data.record_fields import Location, Words, domain_key, extra_of
from prm.data.splitter import last_first_step
from prm.schema import Step, StepExample

_SHEPHERD = re.compile(r"(?<![^\W\d_])ки(?![^\W\d_])")  # no part of a Russian word
_MARKS = (_SHEPHERD, re.compile("<prm>"), re.compile("<extra_0>"), re.compile(r"\n{5,}"))
_TEXTS = ("input", "text")
VALUES = ("value", "values", "labels", "label")
_ASKED = re.compile(r"\s*Question:[ \t]*")
_PROCESS = re.compile(r"\n[ \t]*+Process:[ \t]*")


def matches_math_shepherd(record: Mapping[str, Any]) -> bool:
    """Whether the record is a marked text and the same text with signs."""
    text = record.get("input")
    marked = isinstance(text, str) and bool(_SHEPHERD.search(text))
    return marked and isinstance(record.get("label"), str)


def matches_openrlhf(record: Mapping[str, Any]) -> bool:
    """Whether the record is a text and a list of labels."""
    text = any(isinstance(record.get(name), str) for name in _TEXTS)
    values = [name for name in VALUES if name in record]
    listed = bool(values) and (values[0] == "value" or isinstance(record[values[0]], list))
    return text and listed and "add" not in record


def matches_openr(record: Mapping[str, Any]) -> bool:
    """Whether the record is a question and a process."""
    return {"question", "process"} <= record.keys()


def matches_mm_prm(record: Mapping[str, Any]) -> bool:
    """Whether a turn of the record's conversations is a list of labels."""
    turns = record.get("conversations")
    return isinstance(turns, list) and any(
        isinstance(turn, dict) and isinstance(turn.get("value"), list) for turn in turns
    )


def read_math_shepherd(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a Math-Shepherd row.

    Raises:
        DataError: A field is wrong; the error names it.
    """
    location.need(record, "input", "label")
    pieces = _SHEPHERD.split(location.text(record["input"], "input"))
    if len(pieces) == 1:
        location.refuse("input", 'a text with the mark "ки" behind every step', record["input"])
    signs = _signs(pieces, location.text(record["label"], "label"), location)
    question, texts, extra = _opened(pieces, "input", location)
    signs = signs[extra.get("marks_in_question", 0) :]
    steps = tuple(map(Step, texts, [*signs, None][: len(texts)]))
    used = ("input", "label", "task")
    return (_example(record, location, question, steps, used, "task", extra),)


def read_openrlhf(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a row of OpenRLHF or ER-PRM.

    Raises:
        DataError: A field is wrong; the error names it (``value[3]``).
    """
    field = one_of(record, _TEXTS, location)
    values = next((name for name in VALUES if name in record), VALUES[0])
    location.need(record, field, values)
    pieces = _pieces(location.text(record[field], field))
    asked = location.optional_text(record, "question")
    question, texts, extra = _opened(pieces, field, location, asked)
    early = extra.get("marks_in_question", 0)
    steps = _labelled(texts, record[values], values, location, early)
    return (_example(record, location, question, steps, (field, values, "question"), None, extra),)


def read_openr(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a row with a question and a marked process.

    Raises:
        DataError: A field is wrong; the error names it (``labels[3]``).
    """
    values = "labels" if "labels" in record else "label"
    location.need(record, "question", "process", values)
    question = location.text(record["question"], "question")
    texts = _steps(_pieces(location.text(record["process"], "process")), "process", location)
    given = record[values]
    steps = _labelled(texts, given if isinstance(given, list | str) else [given], values, location)
    return (_example(record, location, question, steps, ("question", "process", values)),)


def read_mm_prm(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a training row of MM-PRM.

    Raises:
        DataError: A field is wrong; the error names it (``conversations[1].value[3]``).
    """
    location.need(record, "conversations")
    given = location.listed(record["conversations"], "conversations", "turns")
    turns = {}
    for number, turn in enumerate(given):
        field = f"conversations[{number}]"
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            location.refuse(field, 'an object such as {"from": "human", "value": ...}', turn)
        role = turn["from"]
        if role not in ("system", "human", "gpt") or role in turns:
            location.refuse(f"{field}.from", 'one turn of "human" and one of "gpt"', role)
        turns[role] = (f"{field}.value", turn["value"])
    location.need(turns, "human", "gpt")
    field, value = turns["human"]
    images = location.images(record, "image", "images", "image_path")
    text = drop_placeholders(location.text(value, field), len(images))
    asked, process = _ASKED.match(text), _PROCESS.search(text)
    if asked is None or process is None or process.start() < asked.end():
        location.refuse(field, '"Question: ...", and "Process: ..." on a line of its own', text)
    question = drop_placeholders(text[asked.end() : process.start()].strip(), len(images))
    question = location.text(question, field)
    texts = _steps(_pieces(text[process.end() :]), field, location)
    steps = _labelled(texts, turns["gpt"][1], turns["gpt"][0], location)
    return (_example(record, location, question, steps, ("conversations",)),)


def marked_steps(text: str, field: str, location: Location) -> list[str] | None:
    """Return the steps of a text with the mark "ки" behind them, or None if it has no mark."""
    pieces = _SHEPHERD.split(text)
    return None if len(pieces) == 1 else _steps(pieces, field, location)


def _example(
    record: Mapping[str, Any],
    location: Location,
    question: str,
    steps: tuple[Step, ...],
    used: Sequence[str],
    domain: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> StepExample:
    domain = domain or domain_key(record)
    images = ("image", "images", "image_path")
    return StepExample(
        id=location.own_id(record, (question, *(step.text for step in steps))),
        question=question,
        images=location.images(record, *images),
        steps=steps,
        domain=location.name(record, domain),
        correct=location.optional_bool(record, "correct"),
        group=location.name(record, "group"),
        extra=extra_of(record, (*used, *images, domain, "id", "correct", "group"), **(more or {})),
    )


def _opened(
    pieces: Sequence[str], field: str, location: Location, asked: str | None = None
) -> tuple[str, list[str], dict[str, Any]]:
    """Return the question that opens the pieces, the steps, and what to note in ``extra``."""
    extra: dict[str, Any] = {}
    first, *rest = pieces
    if asked is None or not first.lstrip().startswith(asked):
        named = (n for n, piece in enumerate(pieces) if last_first_step(piece) is not None)
        early = next(named, 0)  # marks before "Step 1:" are in the question
        if early:
            first, rest = "".join(pieces[: early + 1]), list(pieces[early + 1 :])
            extra["marks_in_question"] = early
        asked = opening_question(first) if last_first_step(first) is None else None
        if asked is not None:
            extra["question_end"] = "guessed"
    if asked is None:
        question, first = cut_question(first, field, location)
    else:
        question, first = asked.strip(), first.lstrip()[len(asked) :]
    return question, _steps([first, *rest], field, location), extra


def _pieces(text: str) -> list[str]:
    mark = next((mark for mark in _MARKS if mark.search(text)), None)
    return [text] if mark is None else mark.split(text)


def _steps(pieces: Sequence[str], field: str, location: Location) -> list[str]:
    """Return the stripped texts before the marks, and the one behind the last if it has any."""
    texts = [piece.strip() for piece in pieces]
    if len(texts) > 1 and not texts[-1]:
        texts.pop()
    for number, text in enumerate(texts, start=1):
        if not text:
            found = Words(f"nothing between two marks (step {number} of {len(texts)})")
            location.refuse(field, "a text before every mark", found, "remove the mark")
    return texts


def _labelled(
    texts: Sequence[str], values: object, field: str, location: Location, early: int = 0
) -> tuple[Step, ...]:
    """Pair steps with the labels of their marks, behind ``early`` labels of other marks."""
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except (json.JSONDecodeError, RecursionError):
            values = [values]
    given = location.listed(values, field, "labels")
    if len(given) != len(texts) + early:
        inside = f" and {early} marks in the question" if early else ""
        found = Words(f"{len(given)} for {len(texts)} steps{inside}")
        location.refuse(field, "as many labels as steps", found)
    return tuple(
        Step(text, location.label(given[number], f"{field}[{number}]", boolean=True))
        for number, text in enumerate(texts, start=early)
    )


def _signs(pieces: Sequence[str], text: str, location: Location) -> list[float]:
    """Return the labels that stand in ``text`` in place of the marks between ``pieces``."""
    labels: list[float] = []
    at = 0
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        there = text[at:].strip() == piece.strip() if last else text.startswith(piece, at)
        at += len(piece)
        sign = text[at : at + 1]
        if not there or not (last or sign in ("+", "-")):
            found = Words(f"{text[max(0, at - 20) : at + 20]!r} at mark {number + 1}")
            location.refuse("label", "the text of 'input' with + or - in place of every ки", found)
        if not last:
            labels.append(float(sign == "+"))
        at += 1
    return labels
