"""JSONL files of examples: read with every record checked, written all at once or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from prm.images import read_image
from prm.records import parse_record, to_record
from prm.schema import DataError, StepExample

_Fail = Callable[..., NoReturn]
_BOMS = {
    b"\xef\xbb\xbf": "a UTF-8 byte order mark",
    b"\xff\xfe": "a UTF-16 byte order mark",
    b"\xfe\xff": "a UTF-16 byte order mark",
}


def read_jsonl(
    path: str | Path, image_root: str | Path | None = None, *, check_images: bool = False
) -> list[StepExample]:
    """Read a JSONL file; every line has to be right, nothing is skipped.

    Args:
        path: UTF-8, one JSON object a line (see ``prm.records.FIELDS``); labels are "+", "-", a
            number in [0, 1] or null. Keys that are no fields go to ``StepExample.extra``.
        image_root: folder that image paths are relative to; None: the folder of ``path``.
        check_images: decode every image once, so that a truncated file is found now and not in
            the middle of a run. Otherwise only the existence of image files is checked.

    Raises:
        DataError: naming file, line, field, what was expected and found, and what to do.
        FileNotFoundError: ``path`` does not exist.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    examples: list[StepExample] = []
    first_line: dict[str, int] = {}
    seen_images: set[Path] = set()
    for line, record in _records(path):
        example = parse_record(record, root, file=path, line=line)
        if example.id in first_line:
            raise DataError(
                expected="an id that no other line has",
                found=f"{example.id!r} again, first on line {first_line[example.id]}",
                file=path,
                line=line,
                field="id",
                remedy="give every example its own id (instance weights are stored by id); "
                "use 'group' to tie candidates of one question",
            )
        first_line[example.id] = line
        for place, image in enumerate(example.images):
            if image not in seen_images:
                _check_image(image, path, line, f"images[{place}]", decode=check_images)
                seen_images.add(image)
        examples.append(example)
    if not examples:
        raise DataError(
            expected="at least one example",
            found="an empty file",
            file=path,
            remedy="check that the file was written completely",
        )
    return examples


def write_jsonl(
    path: str | Path, examples: Iterable[StepExample], image_root: str | Path | None = None
) -> None:
    """Write examples so that ``read_jsonl`` returns them equal.

    The file appears under its name only when complete (temporary name, then rename). Images below
    ``image_root`` (None: the folder of ``path``) are written relative to it, others as they are.

    Raises:
        DataError: an example that ``read_jsonl`` would refuse, or a key of ``extra`` that is the
            name of a field; ``path`` is then left as it was.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    ids: set[str] = set()
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            for line, example in enumerate(examples, start=1):
                file.write(_to_line(example, root, ids, path, line))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _to_line(example: StepExample, root: Path, ids: set[str], path: Path, line: int) -> str:
    record = to_record(example, root)
    if parse_record(record, root, file=path, line=line) != example:
        raise DataError(
            expected="an example that reads back as it was written",
            found=f"example {example.id!r}, whose keys of 'extra' or image paths do not",
            file=path,
            line=line,
            remedy="do not name a key of 'extra' as a field; give images below image_root or "
            "absolute",
        )
    if example.id in ids:
        raise DataError(
            expected="an id that no other example has",
            found=f"{example.id!r} again",
            file=path,
            line=line,
            field="id",
        )
    ids.add(example.id)
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            expected="values that JSON can hold", found=str(error), file=path, line=line
        ) from error


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, decoded JSON value) of every line."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):

            def fail(
                expected: str, found: str, remedy: str | None = None, line: int = line
            ) -> NoReturn:
                raise DataError(expected=expected, found=found, file=path, line=line, remedy=remedy)

            if line == 1:
                for mark, name in _BOMS.items():
                    if raw.startswith(mark):
                        fail("UTF-8 without a mark", name, "save the file as plain UTF-8")
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                place = f"byte {raw[error.start]:#04x} at column {error.start + 1}"
                fail("UTF-8", place, "save the file as UTF-8")
            if not text.strip():
                fail("a JSON object", "a blank line", "remove blank lines")
            yield line, _decode(text, fail)


def _decode(text: str, fail: _Fail) -> Any:
    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            fail("every key once", f"{twice!r} twice in one object", "keep one of the two")
        return record

    def no_constant(name: str) -> NoReturn:
        fail("finite numbers", name, "write null for an unknown label")

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            fail("finite numbers", digits, "write null for an unknown label")
        return value

    try:
        return json.loads(
            text, object_pairs_hook=no_repeats, parse_constant=no_constant, parse_float=finite
        )
    except DataError:
        raise
    except json.JSONDecodeError as error:
        fail(
            "JSON",
            f"{error.msg} at column {error.colno}",
            "write one complete JSON object per line",
        )
    except (ValueError, RecursionError) as error:
        fail("JSON", " ".join(str(error).split()), "write one complete JSON object per line")


def _check_image(image: Path, file: Path, line: int, field: str, *, decode: bool) -> None:
    found, remedy = None, "check the path; image paths are relative to image_root"
    if not image.is_file():
        found = f"{'a folder' if image.is_dir() else 'no file'} at {image}"
    elif decode:
        try:
            read_image(image)
        except DataError as error:
            found, remedy = f"{error.found} in {image}", error.remedy or remedy
    if found is not None:
        raise DataError(
            expected="a readable image file",
            found=found,
            file=file,
            line=line,
            field=field,
            remedy=remedy,
        )
