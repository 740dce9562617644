"""``messages`` with ``images``: chat turns as trainers and servers take them.

``{"messages": [{"role": "system" | "user" | "assistant", "content": text or parts}, ...],
"images": [path, ...]}``; parts are ``{"type": "text", "text"}`` and ``{"type": "image"}``, the
latter with the path in ``image``, ``path`` or ``url`` or none. User turns are steps, assistant
turns their labels, as in ``prm.data.formats.turns``; a ``question`` beside the messages is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prm.data.formats.turns import Turn, question_and_steps
from prm.data.record_fields import Place, Words, extra_of
from prm.schema import StepExample

_ROLES = ("system", "user", "assistant")
_USED = ("id", "messages", "question", "images", "image", "domain", "group", "answer", "correct")


def matches(record: Mapping[str, Any]) -> bool:
    """Whether the record has messages."""
    return "messages" in record


def read(record: Mapping[str, Any], place: Place) -> tuple[StepExample, ...]:
    """The example of a record.

    Raises:
        DataError: A field is wrong; the error names it (``messages[3].content``).
    """
    place.need(record, "messages")
    turns, inside = _turns(record, place)
    images = place.images(record, "images", "image")
    if inside and images:
        found = Words(f"{len(inside)} in the messages, {len(images)} beside them")
        place.refuse("images", "image paths in the messages or beside them, not both", found)
    images = images or inside
    question = place.optional_text(record, "question")
    question, steps = question_and_steps(turns, len(images), place, question)
    return (
        StepExample(
            id=place.own_id(record, (question, *(step.text for step in steps))),
            question=question,
            images=images,
            steps=steps,
            domain=place.name(record, "domain"),
            answer=place.optional_text(record, "answer", blank=True),
            correct=place.optional_bool(record, "correct"),
            group=place.name(record, "group"),
            extra=extra_of(record, _USED),
        ),
    )


def _turns(record: Mapping[str, Any], place: Place) -> tuple[list[Turn], tuple[Path, ...]]:
    turns: list[Turn] = []
    images: list[Path] = []
    for number, message in enumerate(place.listed(record["messages"], "messages", "messages")):
        field = f"messages[{number}]"
        if not isinstance(message, dict):
            place.refuse(field, 'an object such as {"role": "user", "content": ...}', message)
        for name in ("role", "content"):
            if name not in message:
                place.refuse(f"{field}.{name}", f"the field {name!r}", Words("nothing"))
        role = message["role"]
        if role not in _ROLES:
            place.refuse(f"{field}.role", '"system", "user" or "assistant"', role)
        text = _content(message["content"], f"{field}.content", place, images)
        turns.append(Turn(role, text, f"{field}.content"))
    return turns, tuple(images)


def _content(value: object, field: str, place: Place, images: list[Path]) -> str:
    if not isinstance(value, list):
        return place.text(value, field, blank=True)
    texts = []
    for number, part in enumerate(value):
        inner = f"{field}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(place.text(part.get("text"), f"{inner}.text", blank=True))
        elif kind == "image":
            texts.append("<image>\n")
            name = next((key for key in ("image", "path", "url") if part.get(key)), None)
            if name is not None:
                images.append(place.image(part[name], f"{inner}.{name}"))
        else:
            place.refuse(inner, 'a part of type "text" or "image"', part)
    return "".join(texts)
