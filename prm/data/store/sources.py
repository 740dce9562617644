"""Where the records of a file are read from again: its own lines, or a temporary copy."""

from __future__ import annotations

import marshal
import os
import tempfile
import zlib
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from prm.data.json_rows import Span, json_line
from prm.schema import DataError


class Place(NamedTuple):
    """Where a record lies in its source, and the line that messages name."""

    line: int
    span: Span


class Source(Protocol):
    """The records of a file, read again by their places. It can be pickled, and lives in forks."""

    def records(self, places: Iterable[Place]) -> Iterator[Any]:
        """Yield the decoded record of every place.

        Raises:
            DataError: The file has changed, or is gone.
        """

    @property
    def version(self) -> Hashable:
        """What is another value once the records may have changed."""


@dataclass(frozen=True)
class JsonlFile:
    """An uncompressed JSONL file, opened for every request: a few rows, a batch."""

    path: Path

    def records(self, places: Iterable[Place]) -> Iterator[Any]:
        """Yield the decoded record of every place; see ``Source``."""
        try:
            with self.path.open("rb") as file:
                for line, span in places:
                    file.seek(span.start)
                    raw = file.read(span.size)
                    if zlib.crc32(raw) != span.checksum:
                        raise self._changed("another one", line)
                    yield json_line(raw, self.path, line)
        except OSError as error:
            raise self._changed(f"{error.strerror}") from error

    @property
    def version(self) -> Hashable:
        """Size, time and number of the file, None without one; see ``Source``."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_size, status.st_mtime_ns, status.st_ino

    def _changed(self, found: str, line: int | None = None) -> DataError:
        return DataError(
            expected="the row that was there when the file was checked",
            found=found,
            file=self.path,
            line=line,
            remedy="do not change a data file while a command uses it; put it back, or start again",
        )


class Spool:
    """A temporary copy of the records of a file that cannot be read from its middle.

    It has no name, so nothing remains of it when the process ends, however that is. The folder is
    the system's for temporary files (``TMPDIR``). Pickling copies the content.

    Raises:
        OSError: It cannot be written, here or by a method.
    """

    def __init__(self, content: bytes = b"") -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._size = 0
        self._write(content)
        self.complete()

    def append(self, record: Any) -> Span:
        """Keep a record: values of JSON, and bytes. Return its span."""
        # marshal gives these back exactly; it is unfit for files of others, which this is not.
        return self._write(marshal.dumps(record))

    def complete(self) -> None:
        """Write what is still in the buffer, which forked processes would write again."""
        with _named():
            self._file.flush()

    def records(self, places: Iterable[Place]) -> Iterator[Any]:
        """Yield the decoded record of every place, once ``complete``; see ``Source``."""
        for place in places:
            yield marshal.loads(self._read(place.span.start, place.span.size))

    @property
    def version(self) -> Hashable:
        """Always the same; see ``Source``."""
        return ()

    def _read(self, start: int, size: int) -> bytes:
        if hasattr(os, "pread"):  # forked processes share the position in the file
            return os.pread(self._file.fileno(), size, start)
        self._file.seek(start)
        raw = self._file.read(size)
        self._file.seek(0, os.SEEK_END)
        return raw

    def _write(self, raw: bytes) -> Span:
        with _named():
            self._file.write(raw)
        span = Span(self._size, len(raw), 0)
        self._size += len(raw)
        return span

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            with suppress(OSError):  # what could not be written before
                self._file.close()

    def __reduce__(self) -> tuple[type[Spool], tuple[bytes]]:
        return Spool, (self._read(0, self._size),)


@contextmanager
def _named() -> Iterator[None]:
    """Name the folder in the error of a temporary file, which has no name."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror} (a copy of the rows; TMPDIR names another folder)"
        raise OSError(error.errno, reason, tempfile.gettempdir()) from error
