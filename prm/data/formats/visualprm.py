"""Conversations of VisualPRM400K and of DreamPRM-1.5, train and meta rows.

``{"id", "image", "conversations": [{"from": "system" | "human" | "gpt", "value"}, ...]}``, with
``true_false`` in meta rows. See ``prm.data.formats.turns`` for the two layouts of the turns.

- VisualPRM's converter writes -1 as id of every row; such a row gets an id of its own.
- A meta row's ``id`` names the question, which several rows share, and becomes ``group``. Its "+"
  are fillers, not labels; only ``true_false`` is known.
- Meta rows write ``../data/...`` for images below the repository; see ``Location.image``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prm.data.formats.turns import Turn, question_and_steps
from prm.data.record_fields import Location, Words, domain_key, extra_of
from prm.evaluation.final_answer import final_answer
from prm.schema import Step, StepExample

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_USED = ("id", "image", "images", "conversations", "true_false", "group")
PLACEHOLDER_ID = "-1"
"""The id that VisualPRM's converter writes into every row."""


def matches(record: Mapping[str, Any]) -> bool:
    """Whether the record has conversations with "from", and a text in every turn."""
    turns = record.get("conversations")
    known = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    other = any("role" in turn or isinstance(turn.get("value"), list) for turn in known)
    return "conversations" in record and not other


def read(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a record.

    Raises:
        DataError: A field is wrong; the error names it (``conversations[3].value``).
    """
    location.need(record, "conversations")
    images = location.images(record, "image", "images", cut_parents=True)
    question, steps = question_and_steps(_turns(record, location), len(images), location)
    raw = location.name(record, "id")
    if raw == PLACEHOLDER_ID:
        raw = None
    correct = None
    if "true_false" in record:
        correct = location.optional_bool(record, "true_false")
        if correct is None:
            location.refuse("true_false", "true or false", None)
    is_meta = correct is not None
    needs_id = raw is None or is_meta
    return (
        StepExample(
            id=location.default_id(raw, (question, *(step.text for step in steps)))
            if needs_id
            else str(raw),
            question=question,
            images=images,
            steps=tuple(Step(step.text) for step in steps) if is_meta else steps,
            domain=location.name(record, domain_key(record)),
            answer=final_answer(steps[-1].text) if is_meta else None,
            correct=correct,
            group=location.name(record, "group") or (raw if is_meta else None),
            extra=extra_of(record, (*_USED, domain_key(record))),
        ),
    )


def _turns(record: Mapping[str, Any], location: Location) -> list[Turn]:
    turns = []
    given = location.listed(record["conversations"], "conversations", "turns")
    for number, turn in enumerate(given):
        field = f"conversations[{number}]"
        if not isinstance(turn, dict):
            location.refuse(field, 'an object such as {"from": "human", "value": ...}', turn)
        for name in ("from", "value"):
            if name not in turn:
                other = "turns of 'role' and 'content' are the format rlhflow"
                remedy = other if "role" in turn else None
                location.refuse(f"{field}.{name}", f"the field {name!r}", Words("nothing"), remedy)
        if not isinstance(turn["from"], str) or turn["from"] not in _ROLES:
            location.refuse(f"{field}.from", '"system", "human" or "gpt"', turn["from"])
        role = _ROLES[turn["from"]]
        text = location.text(turn["value"], f"{field}.value", blank=role == "system")
        turns.append(Turn(role, text, f"{field}.value"))
    return turns
