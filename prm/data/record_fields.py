"""Read the fields of a decoded JSON record, and refuse wrong ones with their location.

Every data format reads its records with these methods.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from prm.data_urls import PREFIX, decoded, embedded, url_content
from prm.schema import DataError

FIELDS = ("id", "question", "images", "steps", "domain", "answer", "correct", "group")
"""Fields of the project's own records; every other key of a record is kept in ``extra``."""

IMAGE_FIELDS = ("images", "image", "image_path")
"""Fields in which records of the known formats name their images."""

LABELS = '"+", "-", a number in [0, 1] or null (or [right, all], two counts of rollouts)'
_NEAR = 0.8
_FILE_SCHEME = "file://"
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


class Words(str):
    """Text that a message quotes without describing it as a value."""


@dataclass(frozen=True)
class Location:
    """The location of a record, and the folder that its image paths are relative to.

    Attributes:
        root: Folder of the images.
        file: The file that holds the record, if there is one.
        line: Line in a JSONL file, row in a JSON array, counted from 1.
        errors: Takes the errors of single candidates (``one_of_several``), None to raise them.
    """

    root: Path
    file: Path | None = None
    line: int | None = None
    errors: list[DataError] | None = field(default=None, compare=False)

    @contextmanager
    def one_of_several(self) -> Iterator[None]:
        """Keep the error of one candidate, so that the others of its record can be read."""
        try:
            yield
        except DataError as error:
            if self.errors is None:
                raise
            self.errors.append(error)

    def refuse(
        self, field: str | None, expected: str, found: object, remedy: str | None = None
    ) -> NoReturn:
        """Raise this location's ``DataError``; ``found`` is described unless it is ``Words``."""
        raise DataError(
            expected=expected,
            found=found if isinstance(found, Words) else describe(found),
            file=self.file,
            line=self.line,
            field=field,
            remedy=remedy,
        )

    def need(self, record: Mapping[str, Any], *names: str) -> None:
        """Refuse a record that lacks one of ``names``."""
        for name in names:
            if name not in record:
                near = difflib.get_close_matches(name, record, 1, _NEAR)
                remedy = f"rename {near[0]!r} to {name!r}" if near else None
                self.refuse(name, f"the field {name!r}", Words("nothing"), remedy)

    def need_in(self, value: Mapping[str, Any], field: str, *names: str) -> None:
        """Refuse an object inside a record, at ``field``, that lacks one of ``names``."""
        self.need(
            {f"{field}.{key}": held for key, held in value.items()},
            *(f"{field}.{name}" for name in names),
        )

    def text(
        self, value: object, field: str, *, blank: bool = False, remedy: str | None = None
    ) -> str:
        """Return a string that UTF-8 can hold; it may show nothing at all only if ``blank``."""
        if not isinstance(value, str):
            self.refuse(field, "a string", value)
        if value[:1].isalnum() and value.isascii():  # most are, and need no closer look
            return value
        if not blank and not any(map(_is_seen, value)):
            self.refuse(field, "a string that is not blank", value, remedy)
        try:
            value.encode()
        except UnicodeEncodeError:
            surrogate = Words(f"a lone surrogate in {ascii(value)[:60]}")
            self.refuse(field, "text that UTF-8 can hold", surrogate)
        return value

    def step(self, value: object, field: str) -> str:
        """Return the text of a step, which may not be blank."""
        return self.text(value, field, remedy="remove the blank step and its label, or the row")

    def optional_text(
        self, record: Mapping[str, Any], field: str, *, blank: bool = False
    ) -> str | None:
        """Return a string as ``text`` does, or None where the field is null or absent."""
        value = record.get(field)
        return None if value is None else self.text(value, field, blank=blank)

    def name(self, record: Mapping[str, Any], field: str) -> str | None:
        """Return a string or an integer as text (foreign ids are often numbers), or None."""
        value = record.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.optional_text(record, field)

    def optional_bool(self, record: Mapping[str, Any], field: str) -> bool | None:
        """Return true or false, or None where the field is null or absent."""
        value = record.get(field)
        if value is not None and not isinstance(value, bool):
            self.refuse(field, "true, false or null", value)
        return value

    def listed(self, value: object, field: str, what: str, remedy: str | None = None) -> list[Any]:
        """Return a list that has at least one element."""
        if not isinstance(value, list):
            self.refuse(field, f"a list of {what}", value)
        if not value:
            one = what.removesuffix("s")
            self.refuse(field, f"at least one {one}", value, remedy)
        return value

    def label(self, value: object, field: str, *, boolean: bool = False) -> float | None:
        """Return the probability that a step is right; None for a step without a label.

        [K, N], where K of N rollouts were right, is K / N; [0, 0], a step that was never sampled,
        is None. True and false are labels only if ``boolean``.
        """
        if value is None:
            return None
        if isinstance(value, str) and value in ("+", "-"):
            return float(value == "+")
        if isinstance(value, bool) and boolean:
            return float(value)
        if isinstance(value, list):
            return self._share(value, field)
        expected = LABELS if not boolean else f"true, false, {LABELS}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(field, expected, value)
        if not 0 <= value <= 1:  # this refuses NaN, too, and works for an integer of any size
            self.refuse(field, expected, value)
        return float(value)

    def _share(self, value: list[Any], field: str) -> float | None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in value)
        if len(value) != 2 or not whole or not 0 <= value[0] <= value[1]:
            shown = Words(repr(value)[:60])
            self.refuse(field, "[right, all] with 0 <= right <= all, two integers", shown)
        right, total = value
        return None if total == 0 else right / total

    def image(self, value: object, field: str, *, cut_parents: bool = False) -> Path:
        """Return the path of an image; the reader checks whether the file exists.

        A ``data:`` URL and ``{"bytes": base64 or null, "path": path or null}``, the form of Hugging
        Face datasets, become embedded pictures (see ``prm.data_urls``). Other URLs than ``file:``
        are refused.
        With ``cut_parents`` leading ``../`` are dropped from a path that would leave the root: the
        meta file of DreamPRM-1.5 writes ``../data/...`` for ``data/...`` below its repository.
        """
        if isinstance(value, dict):
            return self._image_object(value, field)
        path = self.text(value, field)
        scheme = path[:8].lower()  # a scheme is of either case (RFC 3986, section 3.1)
        if scheme.startswith(PREFIX):
            try:
                return embedded(url_content(path[len(PREFIX) :]))
            except ValueError as error:
                self._not_base64(field, error)
        if scheme.startswith(_FILE_SCHEME):
            path = unquote(path[len(_FILE_SCHEME) :])
        elif _SCHEME.match(path):
            remedy = "download the picture and name its path; nothing is fetched from the network"
            self.refuse(field, 'the path of an image, or a "data:" URL', path, remedy)
        if cut_parents and path.startswith("../"):
            root = os.path.abspath(self.root)
            if not is_below(os.path.normpath(os.path.join(root, path)), root):
                while path.startswith("../"):
                    path = path[3:]
        return self.root / path

    def _image_object(self, value: Mapping[str, Any], field: str) -> Path:
        """Return the image of ``{"bytes": bytes or base64 or null, "path": path or null}``."""
        content = value.get("bytes")
        if content is None:
            if value.get("path") is None:
                self.refuse(field, 'an object with the "bytes" or the "path" of an image', value)
            return self.image(value["path"], f"{field}.path")
        try:
            raw = content if isinstance(content, bytes) and content else None
            return embedded(raw or decoded(self.text(content or " ", f"{field}.bytes", blank=True)))
        except DataError:
            raise
        except ValueError as error:
            self._not_base64(f"{field}.bytes", error)

    def _not_base64(self, field: str, error: ValueError) -> NoReturn:
        remedy = "write the whole file as base64"
        self.refuse(field, "the bytes of an image in base64", Words(str(error)), remedy)

    def images(
        self, record: Mapping[str, Any], *fields: str, cut_parents: bool = False
    ) -> tuple[Path, ...]:
        """Return the images of the one field present: one path, a list of paths, or null."""
        present = [name for name in fields if record.get(name) is not None]
        if not present:
            return ()
        if len(present) > 1:
            self.refuse(present[1], f"images in one field ({present[0]!r})", record[present[1]])
        field, value = present[0], record[present[0]]
        if isinstance(value, str | dict):
            return (self.image(value, field, cut_parents=cut_parents),)
        if not isinstance(value, list):
            self.refuse(field, "a path, a list of paths or null", value)
        return tuple(
            self.image(path, f"{field}[{number}]", cut_parents=cut_parents)
            for number, path in enumerate(value)
        )

    def own_id(self, record: Mapping[str, Any], texts: Iterable[str]) -> str:
        """Return the field ``id``, or an id that is derived from the record's texts."""
        return self.name(record, "id") or self.default_id(None, texts)

    def default_id(self, raw: str | None, texts: Iterable[str], number: int | None = None) -> str:
        """Return an id for a record without one: its source's id, its row, and a hash of the text.

        The hash tells the row from rows of the same number in other files, and in the same file
        after a change.
        """
        digest = hashlib.blake2b(digest_size=4)
        for text in texts:
            digest.update(text.encode() + b"\0")
        row = f"{self.line}" if number is None else f"{self.line}.{number}"
        return f"{raw or 'row'}#{row}-{digest.hexdigest()}"


def domain_key(record: Mapping[str, Any]) -> str:
    """Return the key that names the domain of a foreign record: "domain" or "dataset"."""
    return "domain" if record.get("domain") is not None else "dataset"


def image_field(record: object, number: int) -> str:
    """Return the field of a record that names its image ``number``, for messages."""
    for name in IMAGE_FIELDS:
        value = record.get(name) if isinstance(record, dict) else None
        if value is not None:
            return f"{name}[{number}]" if isinstance(value, list) else name
    return f"images[{number}]"


def extra_of(record: Mapping[str, Any], used: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return the keys of a foreign record that no field took, for ``StepExample.extra``.

    A key that equals or resembles a field of our own records is kept as ``source_<key>``, because
    it means something else in another format (``answer`` of VisualProcessBench is the reference
    answer).
    """
    kept = {
        f"source_{key}" if key in FIELDS or near_field(key, FIELDS) else key: value
        for key, value in record.items()
        if key not in used
    }
    return {**kept, **{key: value for key, value in more.items() if value is not None}}


@lru_cache(maxsize=1024)  # the same few keys come with every row
def near_field(key: str, known: tuple[str, ...]) -> str | None:
    """Return the field of which ``key`` looks like a misspelling, or None."""
    near = next((name for name in known if name == key.strip().lower()), None)
    if near is None and len(key) > 3:
        near = next(iter(difflib.get_close_matches(key.lower(), known, 1, _NEAR)), None)
    return near


def is_below(path: str, root: str) -> bool:
    """Whether the normalised absolute ``path`` lies in the folder ``root``, or equals it."""
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def describe(value: object) -> str:
    """Describe ``value`` for a message by its JSON kind and, where it is short, by itself."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {str: "the string", dict: "an object", list: "a list"}
    kind = next((word for type_, word in kinds.items() if isinstance(value, type_)), "the number")
    if isinstance(value, dict | list):
        return f"{kind} of {len(value)}" if value else f"an empty {kind.split()[-1]}"
    shown = repr(value)
    return f"{kind} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _is_seen(character: str) -> bool:
    """Return whether a character is neither white space nor invisible, as a zero-width space."""
    return not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf")
