"""What is printed: control characters escaped, and standard streams that may go away.

Names, ids and messages may come from other people's files, and a terminal obeys the control
characters in them. ``printable`` is the one function that escapes them. A stream that cannot be
written any more must not end in a traceback: ``standard_streams`` sees to it.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

if TYPE_CHECKING:
    from tqdm import tqdm

_PLAIN = "\n\t\x7f"
"""Characters of a page of text; and one that JSON does not escape and terminals ignore."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CURSOR = re.compile(r"(?:\n|\r|\x1b\[A)*")
"""Movements of the cursor with which a progress bar begins what it writes."""


def printable(text: object, keep: str = "") -> str:
    """Return a text with control characters, overrides of direction and lone surrogates escaped.

    Args:
        text: The text, or an object that becomes one.
        keep: Characters that stay.
    """
    return _CONTROL.sub(lambda found: _escaped(found[0], keep), str(text))


def _escaped(character: str, keep: str) -> str:
    if character in keep:
        return character
    code = ord(character)
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(
        character, f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    )


def say(text: str, error: bool = False) -> None:
    """Print one line, its control characters (line breaks, too) escaped.

    Args:
        text: The line.
        error: Whether it goes to standard error.
    """
    print(printable(text), file=sys.stderr if error else sys.stdout)


def progress_bar(title: str, total: int, done: int = 0, *, shown: bool = True) -> tqdm[NoReturn]:
    """Return a progress bar on standard error, which is shown on a terminal only.

    Args:
        title: What is in progress.
        total: The number of steps.
        done: How many of them are done already.
        shown: Whether it is shown at all.
    """
    from tqdm import tqdm  # imported here: --help need not

    disable = None if shown else True  # None: unless the stream is a terminal
    # leave=None: a bar within another one vanishes when it is full.
    return tqdm(
        desc=title, total=total, initial=done, disable=disable, leave=None, dynamic_ncols=True
    )


def write_bytes(content: bytes) -> None:
    """Write bytes to standard output as they are.

    Raises:
        OSError: Standard output cannot be written; that nobody reads it is no error.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard output")
    sys.stdout.flush()
    with _answered(sys.stdout, "standard output"):
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()


@contextmanager
def standard_streams() -> Iterator[None]:
    """Guard standard output and standard error while the body runs.

    Control characters other than line breaks and tabs are escaped, characters that the encoding of
    the stream lacks, too. Where nobody reads any more (``| head -1``), what is printed is dropped
    and the work goes on; the exit status is that of the work.

    Raises:
        OSError: Standard output cannot be written for another reason, for example a full disk.
    """
    before = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = cast(TextIO, _Guarded(sys.stdout, "standard output"))
    if sys.stderr is not None:
        sys.stderr = cast(TextIO, _Guarded(sys.stderr, None))
    guarded = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in guarded:
            if stream is not None:
                stream.flush()


class _Guarded:
    """A text stream that escapes what a terminal obeys, and survives its reader.

    Args:
        stream: The stream that it writes to.
        name: Its name in the error that it cannot be written. None means that there is no error,
            because the stream is the one that errors go to; progress bars may move its cursor.
    """

    def __init__(self, stream: TextIO, name: str | None) -> None:
        self._stream = stream
        self._name = name

    def write(self, text: str) -> int:
        start = _CURSOR.match(text) if self._name is None else None
        first = start.end() if start else 0
        last = len(text) - (first < len(text) and start is not None and text.endswith("\r"))
        shown = text[:first] + printable(text[first:last], _PLAIN) + text[last:]
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        shown = shown.encode(encoding, "backslashreplace").decode(encoding)
        with _answered(self._stream, self._name):
            self._stream.write(shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with _answered(self._stream, self._name):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _answered(stream: TextIO, name: str | None) -> Iterator[None]:
    """Let a stream lead nowhere once it cannot be written; a missing reader is no error."""
    try:
        yield
    except OSError as error:
        with suppress(OSError, ValueError):  # a stream of a test has no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        if name is not None and error.errno != errno.EPIPE:
            raise OSError(error.errno, error.strerror, name) from error
