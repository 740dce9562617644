"""What a client asks: a question, its pictures, one or several solutions; and what is refused.

    {"question": "What is 3 + 4?", "images": ["iVBORw0KGgo..."], "solution": "3 + 4 = 7"}
    {"question": "What is 3 + 4?", "steps": ["3 + 4 = 7", "Answer: 7"]}
    {"question": "What is 3 + 4?", "solutions": ["3 + 4 = 7", ["3 + 4 = 8", "Answer: 8"]]}

Requests come from strangers. Pictures are base64 or ``data:`` URLs: no path and no other URL is
looked at, whatever it names. What is too large is refused before it is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prm.data.json_rows import json_line
from prm.data.record_fields import Location, Words, near_field
from prm.data.splitter import solution_steps
from prm.data_urls import PREFIX, decoded, embedded, url_content
from prm.inputs.tiles import pixel_count
from prm.schema import DataError

Form = Literal["solution", "steps", "solutions"]

_FORMS: tuple[Form, ...] = ("solution", "steps", "solutions")
FIELDS = ("question", "images", *_FORMS)
_HERE = Location(Path())


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request may bring.

    Attributes:
        body: Bytes of the request, which are counted before it is parsed.
        candidates: Solutions.
        steps: Steps of a solution.
        characters: Characters of the question and of all solutions together.
        images: Pictures.
        image_bytes: Bytes of a picture.
        pixels: Pixels of a picture, by its header.
    """

    body: int = 32 * 2**20
    candidates: int = 64
    steps: int = 256
    characters: int = 200_000
    images: int = 16
    image_bytes: int = 16 * 2**20
    pixels: int = 20_000_000


@dataclass(frozen=True)
class Asked:
    """A request that can be scored.

    Attributes:
        question: The question.
        solutions: The steps of every solution. One without steps cannot be judged.
        images: The pictures of the question, embedded (``prm.data_urls``).
        form: The field in which the solutions came.
        are_texts: Which of the solutions came as texts, whose steps the client does not know.
    """

    question: str
    solutions: tuple[tuple[str, ...], ...]
    images: tuple[Path, ...]
    form: Form
    are_texts: tuple[bool, ...]

    def refusal(self, row: int, error: DataError) -> DataError:
        """Return the error of a solution with the field of the request that is at fault."""
        field = error.field or ""
        if error.file in self.images:
            field = f"images[{self.images.index(error.file)}]"
        elif field.split("[")[0] not in ("question", "images"):
            field = _field(self.form, row) + (
                "" if self.are_texts[row] else field.removeprefix("steps")
            )
        if self.are_texts[row] and not self.solutions[row]:  # its steps are not the client's
            error = error.copy(expected="a text that is not blank", found="a blank one")
        # What to do instead is said to users of the commands, not to clients.
        return error.copy(file=None, example=None, remedy=None, field=field)


def read_request(raw: bytes, limits: Limits) -> Asked:
    """Return what the body of a request asks.

    Raises:
        DataError: It is no JSON object of this form, or more than ``limits`` allow. The error names
            the field.
    """
    try:
        record = json_line(raw, Path(), 1)
    except DataError as error:
        raise error.copy(file=None, line=None, remedy=None) from error
    if not isinstance(record, dict):
        _HERE.refuse(None, "a JSON object", record)
    form = _form(record)
    question = _HERE.text(record["question"], "question")
    room = _Room(limits.characters - len(question), limits)
    if room.characters < 0:
        room.refuse_text("question")
    solutions, are_texts = _solutions(form, record[form], room)
    images = record.get("images") or []
    listed = _list_of(images, "images", "pictures", limits.images)
    return Asked(
        question,
        solutions,
        tuple(_image(image, f"images[{n}]", limits) for n, image in enumerate(listed)),
        form,
        are_texts,
    )


def _form(record: Mapping[str, Any]) -> Form:
    """Return the field that holds the solutions; others must be known."""
    for name in record:
        if name not in FIELDS:
            near = near_field(name, FIELDS)
            remedy = f"rename it to {near!r}" if near else None
            _HERE.refuse(name[:60], f"the fields {', '.join(FIELDS)}", Words("this one"), remedy)
    _HERE.need(record, "question")
    given = [form for form in _FORMS if record.get(form) is not None]
    if len(given) != 1:
        what = "one of the fields solution, steps and solutions"
        found = Words(" and ".join(given) or "none")
        _HERE.refuse(given[1] if given else "solution", what, found)
    return given[0]


@dataclass
class _Room:
    """What the rest of a request may still hold."""

    characters: int
    limits: Limits

    def take(self, value: object, field: str) -> str:
        """Return a text; whether it is blank is the scorer's to judge, for each solution alone."""
        text = _HERE.text(value, field, blank=True)
        self.characters -= len(text)
        if self.characters < 0:
            self.refuse_text(field)
        return text

    def refuse_text(self, field: str) -> None:
        most = self.limits.characters
        _HERE.refuse(
            field,
            f"at most {most:,} characters in question and solutions together",
            Words("more"),
        )


def _solutions(
    form: Form, value: object, room: _Room
) -> tuple[tuple[tuple[str, ...], ...], tuple[bool, ...]]:
    """Return the steps of every solution, and which of them came as texts."""
    most = room.limits.candidates
    listed = _list_of(value, form, "solutions", most) if form == "solutions" else [value]
    if not listed:
        _HERE.refuse(form, "at least one solution", listed)
    solutions = tuple(_steps(form, one, _field(form, row), room) for row, one in enumerate(listed))
    return solutions, tuple(isinstance(one, str) for one in listed)


def _steps(form: Form, value: object, field: str, room: _Room) -> tuple[str, ...]:
    if form == "solution" or (form == "solutions" and isinstance(value, str)):
        steps = tuple(solution_steps(room.take(value, field)))
    elif isinstance(value, list):
        most = room.limits.steps
        if len(value) <= most:
            return tuple(room.take(step, f"{field}[{n}]") for n, step in enumerate(value))
        steps = tuple(value)
    else:
        what = "a list of steps" if form == "steps" else "a text or a list of steps"
        _HERE.refuse(field, what, value)
    if len(steps) > room.limits.steps:
        _HERE.refuse(field, f"at most {room.limits.steps:,} steps", Words(f"{len(steps):,}"))
    return steps


def _field(form: Form, row: int) -> str:
    return f"{form}[{row}]" if form == "solutions" else form


def _list_of(value: object, field: str, what: str, most: int) -> list[Any]:
    if not isinstance(value, list):
        _HERE.refuse(field, f"a list of {what}", value)
    if len(value) > most:
        _HERE.refuse(field, f"at most {most:,} {what}", Words(f"{len(value):,}"))
    return value


def _image(value: object, field: str, limits: Limits) -> Path:
    """Return an embedded picture of base64; nothing else is ever opened."""
    text = _HERE.text(value, field)
    expected = 'the bytes of a picture in base64, or a "data:" URL'
    try:
        is_url = text[: len(PREFIX)].lower() == PREFIX
        content = url_content(text[len(PREFIX) :]) if is_url else decoded(text)
    except ValueError as error:
        shown = text if len(text) <= 40 else text[:40] + "..."
        found = Words(f"{shown!r}: {error}")
        _HERE.refuse(field, expected, found, "nothing is fetched for a client")
    if len(content) > limits.image_bytes:
        most = f"a picture of at most {limits.image_bytes:,} bytes"
        _HERE.refuse(field, most, Words(f"{len(content):,}"))
    path = embedded(content)
    try:
        pixels = pixel_count(path)
    except DataError as error:
        raise error.copy(file=None, remedy=None, field=field) from error
    if pixels > limits.pixels:
        _HERE.refuse(field, f"a picture of at most {limits.pixels:,} pixels", Words(f"{pixels:,}"))
    return path
