"""What rows are packed in: compressed text, a table of columns, or something that holds no rows.

Text may be compressed by gzip, bzip2, xz or zstandard; the content tells, not the name. Tables are
Parquet and Arrow files, as Hugging Face data sets have them. All are read in pieces.
"""

from __future__ import annotations

import bz2
import codecs
import datetime
import decimal
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, runtime_checkable

from prm.signatures import LOOK, content_of

ROWS_AT_ONCE = 64
"""How many rows of a table are held at once; with pictures each may take megabytes."""

_PACKED_AT_ONCE = 2**12  # little, because a few bytes can hold thousands of times as many
_TO_JSON = "convert it to one JSON object per line"
_TO_UTF8 = "save the file as UTF-8, for example by: iconv -f {} -t UTF-8"
_MARKS = {
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
}
"""Byte order marks; that of UTF-32, little end first, starts with the one of UTF-16."""
_ZEROS: dict[tuple[bool, ...], str] = {
    **{(False, True, True, True): "UTF-32LE", (True, True, True, False): "UTF-32BE"},
    **{(False, True, False, True): "UTF-16LE", (True, False, True, False): "UTF-16BE"},
}
"""Which of the first four bytes of JSON are zero (RFC 4627, section 3)."""
_TABLE_SIGNS = {b"PAR1": "parquet", b"ARROW1": "arrow file", b"\xff\xff\xff\xff": "arrow stream"}
_COLUMNS = re.compile(rb"[^{\[\n]*[,\t;][^{\[\n]*\r?\n[^{\[]")


@runtime_checkable
class Reader(Protocol):
    """Bytes that can be looked at before they are read, as of ``io.BufferedReader``."""

    def peek(self, size: int = ..., /) -> bytes:
        """Return the next bytes, as many as are at hand, without passing over them."""

    def read(self, size: int = ..., /) -> bytes:
        """Return the next bytes, at most ``size``."""

    def readline(self, size: int = ..., /) -> bytes:
        """Return the next line, or its first ``size`` bytes."""


class Unlike(NamedTuple):
    """What a file is in place of rows, and what to do about it."""

    found: str
    remedy: str


class Damaged(Exception):
    """Packed data cannot be unpacked further."""


class Repeated(Exception):
    """A table has two columns, or an object in it two fields, of the name that is the text."""


@contextmanager
def unpacked(path: Path) -> Iterator[Reader]:
    """Open a file of text to read its bytes, decompressed if it is compressed.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ModuleNotFoundError: The file is compressed by zstandard, which is not installed.
        Damaged: On reading: the compressed data are damaged or end too early.
    """
    with path.open("rb") as file:
        start = file.peek(8)[:8]
        inner = _decompressor(start, file)
        if inner is None:
            yield file
        else:
            with closing(inner), io.BufferedReader(_Checked(inner), 2**16) as reader:
                yield reader


def _decompressor(start: bytes, file: IO[bytes]) -> Any:
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file, mode="rb")
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if start.startswith(b"\xfd7zXZ"):
        return lzma.LZMAFile(file)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise _missing("zstandard", "a file compressed by zstandard") from error
        return _Zstandard(file, zstandard.ZstdDecompressor().decompressobj)
    return None


class _Zstandard:
    """The content of a zstandard file; its own reader takes a file that is cut off for a whole."""

    def __init__(self, file: IO[bytes], frame: Callable[[], Any]) -> None:
        self._file, self._new_frame = file, frame
        self._frame = frame()
        self._packed = self._held = b""

    def read(self, size: int) -> bytes:
        while not self._held:
            packed = self._packed or self._file.read(_PACKED_AT_ONCE)
            if not packed:
                if not self._frame.eof:
                    raise EOFError("the compressed data end before their end mark")
                return b""
            if self._frame.eof:
                self._frame = self._new_frame()
            self._held, self._packed = self._frame.decompress(packed), self._frame.unused_data
        data, self._held = self._held[:size], self._held[size:]
        return data

    def close(self) -> None:
        self._file.close()


class _Checked(io.RawIOBase):
    """The decompressed bytes; every error of a decompressor is ``Damaged``."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise Damaged(" ".join(str(error).split())) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "zstandard":
                raise
            raise Damaged(" ".join(str(error).split())) from error
        buffer[: len(data)] = data
        return len(data)


def unlike_rows(start: bytes) -> Unlike | None:
    """Return what text is that begins with ``start``, if it is none of JSON."""
    if not start:
        return None
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return Unlike(f"a {name} byte order mark", _TO_UTF8.format(name))
    if content := content_of(start[:LOOK]):
        return Unlike(content.name, content.remedy or _TO_JSON)
    if unmarked := _ZEROS.get(tuple(not byte for byte in start[:4])):
        return Unlike(f"{unmarked[:6]} without a mark", _TO_UTF8.format(unmarked))
    if b"\0" in start[:64] and not start.lstrip().startswith((b"{", b"[")):
        return Unlike("binary data", _TO_JSON)
    if _COLUMNS.match(start):
        first = start.splitlines()[0].decode("utf-8", "replace").strip()
        shown = first if len(first) <= 60 else first[:57] + "..."
        return Unlike(
            f"a table of separated values (CSV, TSV) with the first line {shown!r}",
            f"{_TO_JSON}, for example by pandas: "
            "read_csv(...).to_json(..., orient='records', lines=True)",
        )
    return None


def table_kind(path: Path) -> str | None:
    """Return "parquet", "arrow file" or "arrow stream" for a table of columns, else None."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((kind for sign, kind in _TABLE_SIGNS.items() if start.startswith(sign)), None)


def table_rows(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as JSON would hold them, without columns that are null.

    Bytes stay bytes: a picture is ``{"bytes": ..., "path": ...}``, and so is a column of bytes.

    Args:
        path: The file.
        kind: Its ``table_kind``.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        Repeated: A name occurs twice, and a row could hold one of the two alone.
        Damaged: The file is damaged or ends too early.
    """
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ModuleNotFoundError as error:
        raise _missing("pyarrow", f"a table ({kind.split()[0].capitalize()})") from error
    try:
        with pyarrow.OSFile(str(path)) as file:
            if kind == "parquet":
                batches = parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE)
            elif kind == "arrow stream":
                batches = _stream_batches(file, ipc.open_stream)
            else:
                reader = ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            for batch in batches:
                _refuse_repeated(batch.schema)
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    for row in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                        yield {k: _plain(v) for k, v in row.items() if v is not None}
    except (pyarrow.ArrowException, OSError) as error:
        raise Damaged(" ".join(str(error).split())) from error


def _stream_batches(file: Any, open_stream: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield the batches of one stream or of several in a row, each up to its end mark.

    Arrow's own reader ends with the first stream, and takes the end of the file for its end mark.
    """
    while file.tell() < file.size():
        stream = open_stream(file)
        while True:
            before = file.tell()
            try:
                batch = stream.read_next_batch()
            except StopIteration:
                break
            yield batch
        if file.tell() == before:
            raise Damaged("an Arrow stream that ends before its end mark")


def _refuse_repeated(fields: Iterable[Any]) -> None:
    names = [field.name for field in fields]
    if len(set(names)) < len(names):
        raise Repeated(next(name for name in names if names.count(name) > 1))
    for field in fields:
        _refuse_repeated([field.type.field(number) for number in range(field.type.num_fields)])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        picture = value.keys() == {"bytes", "path"}
        return value if picture else {key: _plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, str | int | float | None) else str(value)


def _missing(package: str, what: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{what} is read by {package}, which is not installed: pip install 'bilevel-prm[datasets]'"
    )
