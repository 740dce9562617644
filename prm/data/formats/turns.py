"""Conversations in which user turns are steps and assistant turns their labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prm.data.record_fields import Location
from prm.data.splitter import last_first_step
from prm.schema import Step

_QUESTION = re.compile(r"((?:\s*<image>)*)\s*### Question:[ \t]*\n?")
_PROCESS = re.compile(r"### Solution Process:[ \t]*\n?")
_NUMBERED = re.compile(r"<image\d+>")
_LAST_NUMBERED = re.compile(r"<image\d+>$")
_ASKED = re.compile(r"[?？][\"'”’)\]$]*(?=\s+\S|[^\s\x00-\x7f])")
_SENTENCE = re.compile(r"[.!][\"'”’)\]$]*(?=\s+\S)|[。！](?=\s*\S)")
_PLACEHOLDER = re.compile(r"\s*<image>")


@dataclass(frozen=True)
class Turn:
    """One turn: its role ("system", "user" or "assistant"), its text, and its field."""

    role: str
    text: str
    field: str


def question_and_steps(
    turns: Sequence[Turn], images: int, location: Location, question: str | None = None
) -> tuple[str, tuple[Step, ...]]:
    """Separate the question of a conversation from its steps and their labels.

    The first user turn holds "### Question:" and, after "### Solution Process:", the first step
    (VisualPRM); or the question and, from "Step 1:" on, the first step (RLHFlow); or the question
    alone, and the first step has a user turn of its own (meta and test prompts of DreamPRM-1.5). If
    ``question`` is given, every user turn is a step, and the first may start with the question.
    System turns are left out, because the system instruction is an option of training.

    Raises:
        DataError: Turns do not alternate, a label is neither "+" nor "-", or there is no step.
    """
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken or spoken[0].role != "user":
        role = spoken[0].role if spoken else None
        location.refuse(
            spoken[0].field if spoken else turns_field(turns),
            "a user turn with the question",
            role,
        )
    text = drop_placeholders(spoken[0].text, images)
    spoken[0] = Turn("user", text, spoken[0].field)
    if question is None:
        question, spoken = _question(spoken, location)
    elif text.strip() != question and text.lstrip().startswith(question):
        spoken[0] = Turn("user", text.lstrip()[len(question) :].strip(), spoken[0].field)
    steps = []
    for number in range(0, len(spoken), 2):
        turn = spoken[number]
        if turn.role != "user":
            location.refuse(turn.field, "a user turn with a step", turn.role)
        if number + 1 == len(spoken) or spoken[number + 1].role != "assistant":
            location.refuse(
                turn.field, 'a turn with the label "+" or "-" behind every step', turn.text
            )
        label = spoken[number + 1]
        sign = label.text.strip()
        if sign not in ("+", "-"):
            location.refuse(label.field, 'the label "+" or "-"', label.text)
        steps.append(Step(location.text(turn.text, turn.field), float(sign == "+")))
    if not steps:
        location.refuse(spoken[-1].field if spoken else turns_field(turns), "at least one step", [])
    return question, tuple(steps)


def cut_question(text: str, field: str, location: Location) -> tuple[str, str]:
    """Separate a question from the first step, which follows it from the last "Step 1:" on.

    Raises:
        DataError: There is no "Step 1:", or no question before it.
    """
    cut = last_first_step(text)
    if cut is None or not text[:cut].strip():
        location.refuse(
            field,
            'a question and, from "Step 1:" on, its solution',
            text,
            "give the question in a field 'question' of the record, too, if the solution does "
            'not start with "Step 1:"',
        )
    return location.text(text[:cut].strip(), field), text[cut:].strip()


def opening_question(text: str) -> str | None:
    """Return a question of which nothing tells where it ends, so that the same is always cut alike.

    It is the text up to its first question mark, or else its first sentence; None if that is all.
    """
    for end in (_ASKED, _SENTENCE):
        match = end.search(text)
        if match is not None and text[: match.start()].strip():
            return text[: match.end()].strip()
    return None


def turns_field(turns: Sequence[Turn]) -> str:
    """Return the field that holds the turns."""
    return turns[0].field.partition("[")[0] if turns else "conversations"


def question_text(record: Mapping[str, Any], field: str, images: int, location: Location) -> str:
    """Return the question of a record without its opening marks; see ``drop_placeholders``.

    Raises:
        DataError: The field is not a text, or holds nothing but marks.
    """
    return location.text(drop_placeholders(location.text(record[field], field), images), field)


def drop_placeholders(text: str, images: int) -> str:
    """Remove the ``<image>`` marks that open ``text``, if there are as many as images.

    Prompts put all images first, which is where these marks are. Marks elsewhere, or of another
    number, stay in the text, and ``data validate`` counts them.
    """
    if not images or text.count("<image>") != images:
        return text
    rest = text
    for _ in range(images):
        match = _PLACEHOLDER.match(rest)
        if match is None:
            return text
        rest = rest[match.end() :]
    return rest.lstrip()


def drop_numbered(text: str, images: int) -> str:
    """Remove the marks ``<image1>``, ... that open or end ``text``, if as many as images."""
    if not images or len(_NUMBERED.findall(text)) != images:
        return text
    kept = text.strip()
    while match := _NUMBERED.match(kept):
        kept = kept[match.end() :].lstrip()
    while kept.endswith(">") and (match := _LAST_NUMBERED.search(kept)):
        kept = kept[: match.start()].rstrip()
    return kept


def _question(spoken: list[Turn], location: Location) -> tuple[str, list[Turn]]:
    first, *rest = spoken
    head = _QUESTION.match(first.text)
    body = f"{head[1]}\n{first.text[head.end() :]}" if head else first.text
    process = _PROCESS.search(body) if head else None
    if process is not None:
        rest.insert(0, Turn("user", body[process.end() :], first.field))
        body = body[: process.start()]
    elif not rest or rest[0].role != "user":
        if head is not None or last_first_step(body) is None:
            location.refuse(
                first.field,
                '"### Question:", the question, "### Solution Process:" and the first step; or the '
                'question and, from "Step 1:" on, the first step; or the question alone, with the '
                "first step in a user turn of its own",
                first.text,
                "give the question in a field 'question' of the record, too, if nothing in the "
                "turn tells where it ends",
            )
        body, step = cut_question(body, first.field, location)
        rest.insert(0, Turn("user", step, first.field))
    return location.text(body.strip(), first.field), rest
