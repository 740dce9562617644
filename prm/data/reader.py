"""Read files of examples in any known format, check every record, and write whole files only."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from prm.data.bad_rows import BadRows
from prm.data.formats.table import FORMATS, UNKNOWN, Format, detect, format_named
from prm.data.image_files import ImageFiles
from prm.data.interned import Interned
from prm.data.json_rows import Span, spanned_rows
from prm.data.nested import held_rows, refuse_empty, refuse_nested
from prm.data.record_fields import Location, image_field
from prm.data.records import to_record
from prm.files import write_lines
from prm.names import ImageCheck
from prm.schema import DataError, StepExample

_OWN = format_named("prm-jsonl")


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file.

    Attributes:
        line: Line of a JSONL file or row of a JSON array, counted from 1.
        record: The decoded record as it is in the file.
        examples: Its examples: one, or one per candidate solution.
        format: Name of its format.
        span: Where it lies in an uncompressed JSONL file, None in other files.
        numbers: Which of the record's examples are left, if some are left out; else None.
    """

    line: int
    record: Any
    examples: tuple[StepExample, ...]
    format: str
    span: Span | None = None
    numbers: tuple[int, ...] | None = None

    @property
    def kept(self) -> Sequence[int]:
        """The number of each of ``examples`` among those of the record."""
        return range(len(self.examples)) if self.numbers is None else self.numbers


def iter_rows(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    format: str = "auto",
    tell: Callable[[str], None] | None = None,
) -> Iterator[Row | DataError]:
    """Yield every record of a file, or a ``DataError`` instead of a record that is wrong.

    If single candidates of a record are wrong, their errors come first, then the record with the
    others, if there are any.

    The file is JSONL, one JSON array, a table or another form that ``json_rows`` reads, and is not
    held whole. One object that is no record, but holds lists of them, is read as these (see
    ``prm.data.nested``). Images are neither opened nor looked for, and ids are not compared;
    ``checked_rows`` does both.

    Args:
        path: The file.
        image_root: Folder that image paths are relative to. None means the folder of ``path``.
        format: A name of ``prm.names.FORMAT_NAMES``. "auto" means the format that the first
            record looks like. Records of several formats in one file are errors.
        tell: Takes a note on what is passed over beside the rows.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: There is no format of that name.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    known: Format | None = None if format == "auto" else format_named(format)
    set_by = "--format names"
    unknown: DataError | None = None
    for line, record, span in _unfolded(path, root, known, tell):
        if isinstance(record, DataError):
            yield record
            continue
        errors: list[DataError] = []
        location = Location(root, path, line, errors)
        if known is None:
            try:
                refuse_nested(record, location, _is_record(None))
                refuse_empty(record, location, _is_record(None))
                known = detect(record, location)
                set_by = f"line {line} has"
            except DataError as error:
                if error.expected.startswith(UNKNOWN):
                    unknown = unknown or error
                yield error if unknown is None else _shortened(error, unknown)
                continue
        try:
            if not isinstance(record, dict):
                location.refuse(None, "a JSON object", record, "write one object per line")
            examples = known.examples(record, location)
        except DataError as error:
            yield _of_another_format(error, record, known, set_by)
            continue
        yield from errors
        if examples or not errors:
            yield Row(line, record, examples, known.name, span)


def _unfolded(
    path: Path, root: Path, known: Format | None, tell: Callable[[str], None] | None
) -> Iterator[tuple[int, Any, Span | None]]:
    """Yield the rows; in place of a first object that holds rows, those rows."""
    rows = spanned_rows(path)
    start = list(islice(rows, 2))
    if start and not isinstance(start[0][1], DataError):
        line, record, _ = start[0]
        location, alone = Location(root, path, line), len(start) == 1
        try:
            held = held_rows(record, location, _is_record(known), tell, alone=alone)
        except DataError as error:
            start[0] = line, error, None
        else:
            if held is not None:
                start[:1] = [(number, inner, None) for number, inner in enumerate(held, start=1)]
    yield from start
    yield from rows


def _is_record(known: Format | None) -> Callable[[Mapping[str, Any]], bool]:
    """Return what tells whether an object looks like a record of ``known``, or of any format."""
    formats = FORMATS if known is None else (known,)
    return lambda record: any(format.matches(record) for format in formats)


def _of_another_format(error: DataError, record: object, known: Format, set_by: str) -> DataError:
    """Return an error that says what set the format, if its row does not look like that format."""
    if not isinstance(record, dict) or known.matches(record):
        return error
    remedies = [error.remedy] if error.remedy else []
    format = f"{set_by} the format {known.name} ({known.keys})"
    others = [f"{other.name} ({other.keys})" for other in FORMATS if other.matches(record)]
    if others:
        remedies = [f"{format}, and this row looks like {' or '.join(others)}"]
        remedies += ["write each format to a file of its own"]
    else:
        remedies += [format]
    return error.copy(remedy="; ".join(remedies))


def _shortened(error: DataError, first: DataError) -> DataError:
    """Return an error without what the first of its kind has listed already."""
    if error is first or error.expected != first.expected:
        return error
    return error.copy(expected=f"{UNKNOWN}, as listed for line {first.line}")


def checked_rows(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    format: str = "auto",
    check_images: ImageCheck = "exists",
    allow_outside_images: bool = False,
    bad_rows: BadRows | None = None,
    ids: Interned | None = None,
) -> Iterator[Row]:
    """Yield every record of a file, and raise the error of the first that is wrong.

    Beyond what ``iter_rows`` checks, ids have to be unique, and images have to exist, to pass
    ``check_images``, and to lie below ``image_root`` after symbolic links are followed, unless
    ``allow_outside_images``. Each path is checked once.

    With ``bad_rows`` that skip, what is wrong is left out: a row, or a candidate of a row. ``ids``,
    empty at first, takes the ids, those of what is left out included.

    Raises:
        DataError: A record cannot be used, or too many. The error names file, line or row, field,
            what was expected and found, and what to do.
        FileNotFoundError: ``path`` does not exist.
        ValueError: There is no format of that name.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    bad = BadRows(path) if bad_rows is None else bad_rows
    images = ImageFiles(root, allow_outside=allow_outside_images, check=check_images)
    ids = Interned() if ids is None else ids
    first_lines = array("q")
    before: int | None = 0
    bad.rows = 0
    for row in iter_rows(path, root, format=format, tell=bad.tell):
        bad.rows += row.line != before  # the errors of candidates come before their row
        before = row.line
        if isinstance(row, DataError):
            bad.add(row)
            continue
        usable = []
        for number, example in enumerate(row.examples):
            error = _repeated(example, row, ids, first_lines, path)
            error = error or next(image_errors(row, example, images, path), None)
            if error is None:
                usable.append(number)
            else:
                bad.add(error, example.id)
        bad.count(row.line, len(usable))
        if len(usable) == len(row.examples):
            yield row
        elif usable:
            kept = tuple(row.examples[number] for number in usable)
            yield replace(row, examples=kept, numbers=tuple(usable))
    bad.check()
    if not ids:
        why = f", all left out; {bad.first}" if bad.left_out else ""
        raise DataError(
            expected="at least one example",
            found="an empty file" if not bad.rows else f"none in {bad.rows:,} rows{why}",
            file=path,
            remedy="mend the file" if why else "check that the file was written completely",
        )


def _repeated(
    example: StepExample, row: Row, ids: Interned, first_lines: MutableSequence[int], path: Path
) -> DataError | None:
    number = ids.add(example.id)
    if number == len(first_lines):
        first_lines.append(row.line)
    first = first_lines[number]
    return None if first == row.line else repeated_id(example.id, path, row.line, first)


def read_rows(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    format: str = "auto",
    check_images: ImageCheck = "exists",
    allow_outside_images: bool = False,
    bad_rows: BadRows | None = None,
) -> tuple[list[StepExample], list[int]]:
    """Return all examples of a file, checked as by ``checked_rows``, and the line of each."""
    rows = checked_rows(
        path,
        image_root,
        format=format,
        check_images=check_images,
        allow_outside_images=allow_outside_images,
        bad_rows=bad_rows,
    )
    pairs = [(example, row.line) for row in rows for example in row.examples]
    return [example for example, _ in pairs], [line for _, line in pairs]


def read_examples(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    format: str = "auto",
    check_images: ImageCheck = "exists",
    allow_outside_images: bool = False,
) -> list[StepExample]:
    """Return all examples of a file in any known format, checked as by ``checked_rows``."""
    examples, _ = read_rows(
        path,
        image_root,
        format=format,
        check_images=check_images,
        allow_outside_images=allow_outside_images,
    )
    return examples


def read_jsonl(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    check_images: bool = False,
    allow_outside_images: bool = False,
) -> list[StepExample]:
    """Read a file of our own records, of which every line has to be right; none is skipped.

    Args:
        path: UTF-8, one JSON object a line (see ``prm.data.record_fields.FIELDS``); labels are
            "+", "-", a number in [0, 1], [right, all] rollouts or null. Keys that are not fields
            go to ``StepExample.extra``.
        image_root: Folder that image paths are relative to. None means the folder of ``path``.
        check_images: Decode every image once, so that a truncated file is detected now and not in
            the middle of a run. Otherwise only the existence of image files is checked.
        allow_outside_images: Accept images outside ``image_root``, too.

    Raises:
        DataError: A record cannot be used. The error names file, line, field, what was expected
            and found, and what to do.
        FileNotFoundError: ``path`` does not exist.
    """
    return read_examples(
        path,
        image_root,
        format="prm-jsonl",
        check_images="decode" if check_images else "exists",
        allow_outside_images=allow_outside_images,
    )


def repeated_id(name: str, path: Path, line: int, first: int | str) -> DataError:
    """Return the error of an id that the line ``first`` already has."""
    return DataError(
        expected="an id that no other line has",
        found=f"{name!r} again, first on line {first}",
        file=path,
        line=line,
        field="id",
        remedy="give every example its own id (instance weights are stored by id); use 'group' to "
        "tie candidates of one question",
    )


def image_errors(
    row: Row, example: StepExample, images: ImageFiles, path: Path
) -> Iterator[DataError]:
    """Yield the errors of the images of an example of ``row``."""
    for number, image in enumerate(example.images):
        problem = images.problem(image)
        if problem is not None:
            yield DataError(
                expected=problem.expected,
                found=problem.found,
                file=path,
                line=row.line,
                field=image_field(row.record, number),
                remedy=problem.remedy,
            )


def write_jsonl(
    path: str | Path, examples: Iterable[StepExample], image_root: str | Path | None = None
) -> None:
    """Write examples so that ``read_jsonl`` returns them equal.

    The file appears under its name only when it is complete. Images below ``image_root`` (None
    means the folder of ``path``) are written relative to it, others as they are; the latter are
    read back only with ``allow_outside_images``.

    Raises:
        DataError: ``read_jsonl`` would refuse an example, or a key of ``extra`` is the name of a
            field; ``path`` is then left as it was.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    ids: set[str] = set()
    write_lines(
        path,
        (
            _to_line(example, root, ids, path, line)
            for line, example in enumerate(examples, start=1)
        ),
    )


def _to_line(example: StepExample, root: Path, ids: set[str], path: Path, line: int) -> str:
    record = to_record(example, root)
    if _OWN.examples(record, Location(root, path, line)) != (example,):
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
