"""Chat turns with roles, in the form that trainers and servers accept.

- ``messages``: ``{"messages": [{"role": "system" | "user" | "assistant", "content": text or parts},
  ...], "images": [path, ...]}``. Parts are ``{"type": "text", "text"}``, ``{"type": "image"}`` with
  the picture in ``image``, ``path`` or ``url`` or without one, and OpenAI's ``{"type": "image_url",
  "image_url": {"url"}}``. A picture is a path or a ``data:`` URL; nothing is fetched.
- ``rlhflow``: ``{"conversations": [{"role", "content"}, ...]}``, RLHFlow's training rows. In its
  Deepseek-PRM-Data nothing stands between the question and the first step: the question is then the
  text up to the first question mark, or else the first sentence, what follows belongs to the step,
  and ``extra["question_end"]`` says so. Nothing is lost, the labels are as right, and rows of one
  question have the same.

User turns are steps, and assistant turns are their labels, as in ``prm.data.formats.turns``; a
``question`` beside the turns is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prm.data.formats.turns import Turn, opening_question, question_and_steps
from prm.data.record_fields import Location, Words, extra_of
from prm.data.splitter import last_first_step
from prm.schema import StepExample

_ROLES = ("system", "user", "assistant")
_USED = ("id", "question", "images", "image", "domain", "group", "answer", "correct")


def matches(record: Mapping[str, Any]) -> bool:
    """Whether the record has messages."""
    return "messages" in record


def matches_rlhflow(record: Mapping[str, Any]) -> bool:
    """Whether the record has conversations whose turns have roles."""
    turns = record.get("conversations")
    return isinstance(turns, list) and any(
        isinstance(turn, dict) and "role" in turn for turn in turns
    )


def read(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a record.

    Raises:
        DataError: A field is wrong; the error names it (``messages[3].content``).
    """
    return _read(record, "messages", location)


def read_rlhflow(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a training row of RLHFlow.

    Raises:
        DataError: A field is wrong; the error names it (``conversations[3].content``).
    """
    return _read(record, "conversations", location)


def _read(record: Mapping[str, Any], key: str, location: Location) -> tuple[StepExample, ...]:
    location.need(record, key)
    turns, inside = _turns(record, key, location)
    images = location.images(record, "images", "image")
    if inside and images:
        found = Words(f"{len(inside)} in the messages, {len(images)} beside them")
        location.refuse("images", "image paths in the messages or beside them, not both", found)
    images = images or inside
    question = location.optional_text(record, "question")
    guessed = None
    if key == "conversations" and question is None:
        question = guessed = _guessed(turns)
    question, steps = question_and_steps(turns, len(images), location, question)
    return (
        StepExample(
            id=location.own_id(record, (question, *(step.text for step in steps))),
            question=question,
            images=images,
            steps=steps,
            domain=location.name(record, "domain"),
            answer=location.optional_text(record, "answer", blank=True),
            correct=location.optional_bool(record, "correct"),
            group=location.name(record, "group"),
            extra=extra_of(
                record, (*_USED, key), question_end=None if guessed is None else "guessed"
            ),
        ),
    )


def _guessed(turns: Sequence[Turn]) -> str | None:
    """Return the question of a first turn that holds a step, too, and no mark between the two."""
    spoken = [turn for turn in turns if turn.role != "system"]
    joined = [turn.role for turn in spoken[:2]] == ["user", "assistant"]
    text = spoken[0].text if joined else ""
    marked = "### Question:" in text or "<image>" in text or last_first_step(text) is not None
    return None if marked else opening_question(text)


def _turns(
    record: Mapping[str, Any], key: str, location: Location
) -> tuple[list[Turn], tuple[Path, ...]]:
    turns: list[Turn] = []
    images: list[Path] = []
    what = "messages" if key == "messages" else "turns"
    for number, message in enumerate(location.listed(record[key], key, what)):
        field = f"{key}[{number}]"
        if not isinstance(message, dict):
            location.refuse(field, 'an object such as {"role": "user", "content": ...}', message)
        for name in ("role", "content"):
            if name not in message:
                location.refuse(f"{field}.{name}", f"the field {name!r}", Words("nothing"))
        role = message["role"]
        if role not in _ROLES:
            location.refuse(f"{field}.role", '"system", "user" or "assistant"', role)
        text = _content(message["content"], f"{field}.content", location, images)
        turns.append(Turn(role, text, f"{field}.content"))
    return turns, tuple(images)


def _content(value: object, field: str, location: Location, images: list[Path]) -> str:
    if not isinstance(value, list):
        return location.text(value, field, blank=True)
    texts = []
    for number, part in enumerate(value):
        inner = f"{field}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(location.text(part.get("text"), f"{inner}.text", blank=True))
        elif kind == "image":
            texts.append("<image>\n")
            name = next((key for key in ("image", "path", "url") if part.get(key)), None)
            if name is not None:
                images.append(location.image(part[name], f"{inner}.{name}"))
        elif kind == "image_url":
            texts.append("<image>\n")
            given = part.get("image_url")
            url = given.get("url") if isinstance(given, dict) else given
            images.append(location.image(url, f"{inner}.image_url"))
        else:
            location.refuse(inner, 'a part of type "text" or "image" or "image_url"', part)
    return "".join(texts)
