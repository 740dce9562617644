"""Read the values of a JSONL file, a JSON array or a table one at a time, each with its line.

The file is never held whole: memory is one row and a buffer. A mistake is yielded instead of the
value, so that a check can go on after it.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from prm.data.containers import (
    Damaged,
    Reader,
    Repeated,
    table_kind,
    table_rows,
    unlike_rows,
    unpacked,
)
from prm.schema import DataError

_MARK = b"\xef\xbb\xbf"
_LOOK = 4096
_CHUNK = 2**20
_LARGEST_ROW = 2**26
_SPACE = " \t\n\r"
_NUMBER = "+-.eE0123456789"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONE = re.compile("[\ud800-\udfff]")
_TAIL = 16
"""A value that the end of the buffer cuts off fails within this many characters of the end."""


class Span(NamedTuple):
    """Where the line of a row lies in its file, to read it again.

    Attributes:
        start: The offset of its first byte.
        size: The number of its bytes, the line break included.
        checksum: Their CRC-32, by which another content is noticed.
    """

    start: int
    size: int
    checksum: int


class _Refused(Exception):
    """A mistake whose file and line the caller adds."""

    def __init__(
        self, expected: str, found: str, remedy: str | None = None, field: str | None = None
    ) -> None:
        super().__init__(expected, found, remedy, field)
        self.expected, self.found, self.remedy, self.field = expected, found, remedy, field

    def at(self, path: Path, line: int) -> DataError:
        return DataError(
            expected=self.expected,
            found=self.found,
            file=path,
            line=line,
            field=self.field,
            remedy=self.remedy,
        )


def json_rows(path: Path) -> Iterator[tuple[int, Any | DataError]]:
    """Yield (line, value) of every line of a JSONL file, or (row, value) of every other row.

    The content of the file tells what it is: JSONL, one JSON array, JSON objects over several lines
    each, all of these compressed (``prm.data.containers``), or a table, whose rows are objects. A
    byte order mark of UTF-8 is passed over.

    Where a value cannot be read, the ``DataError`` that says why is yielded instead. After
    malformed JSON only a JSONL file can be read further: nothing else says where the next row
    starts.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ModuleNotFoundError: The package that reads such a file is not installed.
    """
    return ((line, value) for line, value, _ in spanned_rows(path))


def spanned_rows(path: Path) -> Iterator[tuple[int, Any | DataError, Span | None]]:
    """Yield what ``json_rows`` does, and the span of the row in an uncompressed JSONL file.

    Rows of other files have none: of a compressed file, a table, an array, or objects over several
    lines each.
    """
    last = 0
    kind = table_kind(path)
    try:
        if kind is not None:
            for last, row in enumerate(table_rows(path, kind), start=1):
                yield last, row, None
        else:
            with unpacked(path) as file:
                in_place = isinstance(getattr(file, "raw", None), io.FileIO)
                for last, value, span in _text_rows(file, path):
                    yield last, value, span if in_place else None
    except Damaged as error:
        refused = _Refused("a complete file", f"{error}", "download or pack the file again")
        yield last + 1, refused.at(path, last + 1), None
    except Repeated as error:
        yield 1, _repeated(str(error), "table").at(path, 1), None


def _text_rows(file: Reader, path: Path) -> Iterator[tuple[int, Any | DataError, Span | None]]:
    start = 0
    if file.peek(len(_MARK)).startswith(_MARK):
        start = len(file.read(len(_MARK)))
    look = file.peek(_LOOK)[:_LOOK]
    unlike = unlike_rows(look)
    if unlike is not None:
        yield 1, _Refused("JSON in UTF-8", unlike.found, unlike.remedy).at(path, 1), None
    elif look.lstrip(_SPACE.encode()).startswith(b"["):
        yield from ((row, value, None) for row, value in _array_rows(file, path))
    elif _spans_lines(look):
        yield from ((row, value, None) for row, value in _object_rows(file, path))
    else:
        yield from _line_rows(file, path, start)


def _spans_lines(start: bytes) -> bool:
    """Whether a file that begins so holds objects over several lines each."""
    first, _, rest = start.lstrip().partition(b"\n")
    following = rest.lstrip()
    if not first.startswith(b"{") or not following or following.startswith(b"{"):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False


def json_line(raw: bytes, path: Path, line: int) -> Any:
    """Return the value of one line of a JSONL file, as strictly as ``json_rows``.

    Raises:
        DataError: The line cannot be read.
    """
    try:
        return _decode_line(raw)
    except _Refused as refused:
        raise refused.at(path, line) from refused


def _line_rows(
    file: Reader, path: Path, start: int
) -> Iterator[tuple[int, Any | DataError, Span | None]]:
    line = 0
    while raw := file.readline(_LARGEST_ROW + 1):
        line += 1
        size = len(raw)
        try:
            if size > _LARGEST_ROW:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(_CHUNK)
                    size += len(raw)
                raise _too_large("a longer one", "one JSON object per line")
            yield line, _decode_line(raw), Span(start, size, zlib.crc32(raw))
        except _Refused as refused:
            yield line, refused.at(path, line), None
        start += size


def _too_large(found: str, remedy: str) -> _Refused:
    return _Refused(f"rows of at most {_LARGEST_ROW:,} characters", found, remedy)


def _decode_line(raw: bytes) -> Any:
    try:
        text = raw.decode().rstrip("\r\n")  # otherwise an error at its end names the next line
    except UnicodeDecodeError as error:
        found = f"byte {raw[error.start]:#04x} at column {error.start + 1}"
        raise _Refused("UTF-8", found, "save the file as UTF-8") from error
    if not text.strip():
        raise _Refused("a JSON object", "a blank line", "remove blank lines")
    remedy = "write one complete JSON object per line"
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if text[: error.pos].endswith("\r"):
            found = "several rows, with a carriage return alone at their ends"
            remedy = "save the file with line feeds as line ends"
            raise _Refused("one JSON object per line", found, remedy) from error
        raise _malformed(error, f"column {error.colno}", remedy) from error
    except RecursionError as error:
        raise _Refused("JSON", " ".join(str(error).split()), remedy) from error
    if _SURROGATE.search(text):
        _refuse_surrogates(value)
    return value


def _malformed(error: json.JSONDecodeError, place: str, remedy: str) -> _Refused:
    """Return the mistake of malformed JSON; a control character, which nobody sees, is named."""
    here = error.doc[error.pos : error.pos + 1]
    if here != "\0" and not error.msg.startswith("Invalid control character"):
        return _Refused("JSON", f"{error.msg.removesuffix(' at')} at {place}", remedy)
    count = len(error.doc) - len(error.doc[error.pos :].lstrip("\0")) - error.pos
    if count > 1:
        cut_off = "write or copy the file again; it was cut off or damaged on its way"
        return _Refused("JSON", f"{count:,} zero bytes (NUL) at {place}", cut_off)
    name = "a zero byte (NUL)" if count else f"the control character {here!r}"
    remedy = f"remove it, or write it as {json.dumps(here)[1:-1]} in a string"
    return _Refused("JSON", f"{name} at {place}", remedy)


class _Buffer:
    """The text of a file from ``position`` on, read only as far as needed."""

    def __init__(self, file: Reader, remedy: str = "write one array of JSON objects") -> None:
        self._remedy = remedy
        self.text = ""
        self.position = 0
        self.ended = False
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._read = 0

    def more(self) -> None:
        """Append at least as much text as is held, and set ``ended`` at the end of the file."""
        held = self.text[self.position :]
        raw = self._file.read(max(_CHUNK, len(held)))
        try:
            self.text = held + self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            at = self._read + error.start
            found = f"a byte that UTF-8 does not allow, near byte {at} of the file"
            raise _Refused("UTF-8", found, "save the file as UTF-8") from error
        self._read += len(raw)
        self.position = 0
        self.ended = not raw

    def peek(self) -> str:
        """Return the next character that is not white space, or "" at the end of the file."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in _SPACE:
                    return self.text[self.position]
                self.position += 1
            if self.ended:
                return ""
            self.more()

    def value(self) -> Any | _Refused:
        """Decode the value at ``position`` and move past it, even if it is refused."""
        while True:
            try:
                value, end = self._decode()
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string")
                cut_off = cut_off or error.pos >= len(self.text) - _TAIL
                if self.ended or not cut_off:
                    place = f"character {error.pos - self.position + 1} of the row"
                    raise _malformed(error, place, self._remedy) from error
            except RecursionError as error:
                raise _Refused("JSON", " ".join(str(error).split())) from error
            else:
                if self.ended or not self._may_go_on(end):
                    self.position = end
                    return value
            if len(self.text) - self.position > _LARGEST_ROW:
                raise _too_large(
                    "a longer one, or a string that does not end",
                    "check the quotes of this row, or write JSONL",
                )
            self.more()

    def _may_go_on(self, end: int) -> bool:
        """Whether the value that ends at ``end`` may be the start of a longer one.

        A number cut at the end of the buffer decodes as a shorter one: "0." as 0 and "1e-" as 1,
        with the characters after ``end`` left over. It is complete only if a character follows
        that is not part of a number.
        """
        while end < len(self.text) and self.text[end] in _NUMBER:
            end += 1
        return end == len(self.text)

    def _decode(self) -> tuple[Any | _Refused, int]:
        try:
            value, end = _DECODER.raw_decode(self.text, self.position)
            if _SURROGATE.search(self.text, self.position, end):
                _refuse_surrogates(value)
            return value, end
        except _Refused as refused:  # valid JSON that we do not accept: find its end
            return refused, _ANY_JSON.raw_decode(self.text, self.position)[1]


def _array_rows(file: Reader, path: Path) -> Iterator[tuple[int, Any | DataError]]:
    buffer = _Buffer(file)
    row = 0
    try:
        buffer.peek()
        buffer.position += 1  # skip the opening bracket
        if buffer.peek() == "]":
            buffer.position += 1
        else:
            while True:
                row += 1
                value = buffer.value()
                mark = buffer.peek()
                if mark not in ("]", ","):
                    names = {"": "the end of the file", "\0": "a zero byte (NUL)"}
                    found = names.get(mark, repr(mark))
                    raise _Refused("',' or ']' behind the row", found, "complete the array")
                yield row, value.at(path, row) if isinstance(value, _Refused) else value
                buffer.position += 1
                if mark == "]":
                    break
                buffer.peek()
        if buffer.peek():
            raise _Refused("nothing behind the array", repr(buffer.peek()), "write one array")
    except _Refused as refused:
        yield max(row, 1), refused.at(path, max(row, 1))


def _object_rows(file: Reader, path: Path) -> Iterator[tuple[int, Any | DataError]]:
    buffer = _Buffer(file, "write one complete JSON object per line")
    row = 0
    try:
        while buffer.peek():
            row += 1
            value = buffer.value()
            yield row, value.at(path, row) if isinstance(value, _Refused) else value
    except _Refused as refused:
        yield row, refused.at(path, row)


def _refuse_surrogates(value: object) -> None:
    """Refuse lone surrogate escapes: such a string can be neither written nor tokenised."""
    left = [(value, "")]
    while left:
        value, field = left.pop()
        if isinstance(value, dict):
            for key, held in value.items():
                left += [(key, field), (held, f"{field}.{key}" if field else key)]
        elif isinstance(value, list):
            left += [(held, f"{field}[{index}]") for index, held in enumerate(value)]
        elif isinstance(value, str) and _LONE.search(value):
            found = f"a lone surrogate in {ascii(value)[:60]}"
            raise _Refused("text that UTF-8 can hold", found, field=ascii(field)[1:-1] or None)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _repeated(twice, "object")
    return record


def _repeated(name: str, inside: str) -> _Refused:
    return _Refused("every key once", f"{name!r} twice in one {inside}", "keep one of the two")


def _no_constant(name: str) -> NoReturn:
    raise _Refused("finite numbers", name, "write null for an unknown label")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        _no_constant(digits)
    return value


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:  # Python converts at most 4300 digits, since time is quadratic
        found = f"a whole number of {len(digits):,} digits"
        raise _Refused(
            "JSON with numbers of a common size", found, "write a shorter number"
        ) from error


_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_repeats,
    parse_constant=_no_constant,
    parse_float=_finite,
    parse_int=_whole,
)
_ANY_JSON = json.JSONDecoder(parse_constant=str, parse_float=str, parse_int=str)
