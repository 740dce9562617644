"""Read the values of a JSONL file or of one JSON array one at a time, each with its line.

The file is never held whole: memory is one row and a buffer. A mistake is yielded instead of the
value, so that a check can go on after it.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from prm.schema import DataError

_BOMS = {
    b"\xef\xbb\xbf": "a UTF-8 byte order mark",
    b"\xff\xfe": "a UTF-16 byte order mark",
    b"\xfe\xff": "a UTF-16 byte order mark",
}
_CHUNK = 2**20
_LARGEST_ROW = 2**26
_SPACE = " \t\n\r"
_NUMBER = "+-.eE0123456789"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONE = re.compile("[\ud800-\udfff]")
_TAIL = 16
"""A value that the end of the buffer cuts off fails within this many characters of the end."""


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
    """Yield (line, value) of every line of a JSONL file, or (row, value) of every array element.

    The first character of the file tells which of the two it is. Where a value cannot be read, the
    ``DataError`` that says why is yielded instead. After malformed JSON an array cannot be read
    further, because nothing says where its next row starts; a JSONL file can.

    Raises:
        FileNotFoundError: ``path`` does not exist.
    """
    with path.open("rb") as file:
        start = file.read(64)
        for mark, name in _BOMS.items():
            if start.startswith(mark):
                refused = _Refused("UTF-8 without a mark", name, "save the file as plain UTF-8")
                yield 1, refused.at(path, 1)
                return
        file.seek(0)
        is_array = start.lstrip(_SPACE.encode()).startswith(b"[")
        yield from _array_rows(file, path) if is_array else _line_rows(file, path)


def json_line(raw: bytes, path: Path, line: int) -> Any:
    """Return the value of one line of a JSONL file, as strictly as ``json_rows``.

    Raises:
        DataError: The line cannot be read.
    """
    try:
        return _decode_line(raw)
    except _Refused as refused:
        raise refused.at(path, line) from refused


def _line_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, Any | DataError]]:
    line = 0
    while raw := file.readline(_LARGEST_ROW + 1):
        line += 1
        try:
            if len(raw) > _LARGEST_ROW:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(_CHUNK)
                raise _too_large("a longer one", "one JSON object per line")
            yield line, _decode_line(raw)
        except _Refused as refused:
            yield line, refused.at(path, line)


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
        raise _Refused("JSON", f"{error.msg} at column {error.colno}", remedy) from error
    except RecursionError as error:
        raise _Refused("JSON", " ".join(str(error).split()), remedy) from error
    if _SURROGATE.search(text):
        _refuse_surrogates(value)
    return value


class _Buffer:
    """The text of a file from ``position`` on, read only as far as needed."""

    def __init__(self, file: IO[bytes]) -> None:
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
                    raise _Refused("JSON", error.msg, "write one array of JSON objects") from error
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


def _array_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, Any | DataError]]:
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
                    found = repr(mark) if mark else "the end of the file"
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
        raise _Refused("every key once", f"{twice!r} twice in one object", "keep one of the two")
    return record


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
