"""A sequence of the examples of a file, which are read when they are asked for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import overload

from prm.data.bad_rows import BadRows
from prm.data.formats.table import format_named
from prm.data.interned import Interned
from prm.data.reader import checked_rows
from prm.data.record_fields import Location
from prm.data.store.outline import Facts, Outline, facts_of
from prm.data.store.sources import JsonlFile, Place, Source, Spool
from prm.names import ImageCheck
from prm.schema import DataError, StepExample

_AT_ONCE = 256

Check = Callable[[Sequence[StepExample]], Iterable[DataError | int | None]]
"""Tells of some examples what is wrong with each, or how many steps can be used; else None."""


class StoredExamples(Sequence[StepExample]):
    """The examples of a file, as equal as ``read_examples`` returns them, read on demand.

    What is in memory is an ``Outline``, about a hundred bytes an example. An example is read from
    the file, where its row lies, and checked against the row's checksum. It can be pickled, and
    forked processes share its memory.

    Attributes:
        path: The file.
        outline: What is known of every example of the file.
        rows: The examples of the sequence, by their number in the outline.
        cuts: How many first steps are left of an example, by the same number, where not all are.
    """

    def __init__(
        self,
        path: Path,
        root: Path,
        format: str,
        source: Source,
        outline: Outline,
        rows: Sequence[int] | None = None,
        cuts: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.path = path
        self.outline = outline
        self.rows = range(len(outline)) if rows is None else rows
        self.cuts = dict(cuts)
        self._root, self._format, self._source = root, format, source

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, row: int) -> StepExample: ...
    @overload
    def __getitem__(self, row: slice) -> list[StepExample]: ...
    def __getitem__(self, row: int | slice) -> StepExample | list[StepExample]:
        if isinstance(row, slice):
            return list(self._read(self.rows[row]))
        (example,) = self._read([self.rows[row]])
        return example

    def __iter__(self) -> Iterator[StepExample]:
        for start in range(0, len(self), _AT_ONCE):  # the file is closed while others use it
            yield from self[start : start + _AT_ONCE]

    def at(self, rows: Sequence[int]) -> list[StepExample]:
        """Return the given examples, for which the file is opened once.

        Raises:
            DataError: The file has changed since it was read.
        """
        return list(self._read([self.rows[row] for row in rows]))

    def only(self, rows: Sequence[int]) -> StoredExamples:
        """Return the given examples alone."""
        return self._with(array("q", (self.rows[row] for row in rows)), self.cuts)

    def cut(self, steps: Mapping[int, int]) -> StoredExamples:
        """Return the examples with the first steps alone of those that ``steps`` names by row."""
        named = {self.rows[row]: kept for row, kept in steps.items()}
        return self._with(self.rows, self.cuts | named)

    def _with(self, rows: Sequence[int], cuts: Mapping[int, int]) -> StoredExamples:
        parts = (self.path, self._root, self._format, self._source, self.outline)
        return StoredExamples(*parts, rows, cuts)

    @property
    def version(self) -> Hashable:
        """What is another value once the file may have changed."""
        return self._source.version

    @property
    def lines(self) -> Sequence[int]:
        """The line of every example."""
        return array("q", map(self.outline.line, self.rows))

    @property
    def ids(self) -> Iterator[str]:
        """The id of every example, in order."""
        return map(self.outline.id, self.rows)

    @property
    def facts(self) -> Iterator[Facts]:
        """What is known of every example without reading it again, in order."""
        for row in self.rows:
            known = self.outline.facts(row)
            yield (
                known._replace(labels=known.labels[: self.cuts[row]]) if row in self.cuts else known
            )

    @property
    def pictures(self) -> Iterator[Path]:
        """The picture files of all examples, in order."""
        return (image for row in self.rows for image in self.outline.images(row))

    def index(self) -> Mapping[str, int]:  # type: ignore[override]
        """Return the position of every id.

        Raises:
            ValueError: Two examples have one id.
        """
        return _Index(self.outline.ids, self.outline.numbered(self.rows), len(self))

    def _read(self, rows: Sequence[int]) -> Iterator[StepExample]:
        read = format_named(self._format).read
        places = [self.outline.place(row) for row in rows]
        # The candidates of one record stand side by side; it is read once for all of them.
        distinct = [
            place
            for before, (place, _) in zip([None, *places], places, strict=False)
            if before is None or before[0] != place
        ]
        records = self._source.records(distinct)
        current: Place | None = None
        examples: tuple[StepExample, ...] = ()
        for row, (place, candidate) in zip(rows, places, strict=True):
            if place != current:
                current = place
                location = Location(self._root, self.path, place.line, [])
                examples = read(next(records), location)
            example = examples[candidate]
            if row in self.cuts:
                example = replace(example, steps=example.steps[: self.cuts[row]])
            yield example


def facts(examples: Iterable[StepExample]) -> Iterator[Facts]:
    """Yield the facts of all examples, for which stored ones are not read again."""
    return examples.facts if isinstance(examples, StoredExamples) else map(facts_of, examples)


class _Index(Mapping[str, int]):
    """The position of every id, by the number of the id."""

    def __init__(self, ids: Interned, positions: Sequence[int], count: int) -> None:
        self._ids, self._positions, self._count = ids, positions, count

    def __getitem__(self, id: str) -> int:
        position = self._positions[self._ids[id]]
        if position < 0:
            raise KeyError(id)
        return position

    def __iter__(self) -> Iterator[str]:
        numbered = sorted((p, number) for number, p in enumerate(self._positions) if p >= 0)
        return (self._ids.text(number) for _, number in numbered)

    def __len__(self) -> int:
        return self._count


def store_examples(
    path: Path,
    image_root: str | Path | None = None,
    *,
    format: str = "auto",
    check_images: ImageCheck = "exists",
    allow_outside_images: bool = False,
    bad_rows: BadRows | None = None,
    check: Check | None = None,
) -> tuple[StoredExamples, list[tuple[int, DataError | int]]]:
    """Read a file once, check every record as ``checked_rows`` does, and keep an outline.

    Records of an uncompressed JSONL file stay there. Those of other files (compressed, tables, one
    array, objects over several lines), whose middle cannot be read, are copied to a temporary file.

    Args:
        path: The file.
        image_root: Folder that image paths are relative to. None means the folder of ``path``.
        format: A name of ``prm.names.FORMAT_NAMES``, or "auto".
        check_images: How closely images are checked.
        allow_outside_images: Accept images outside ``image_root``, too.
        bad_rows: What becomes of bad rows. None refuses the first.
        check: A further check, of some examples at once.

    Returns:
        The examples, and of those that ``check`` finds fault with the number and what it says.

    Raises:
        DataError: A record cannot be used, or too many.
        FileNotFoundError: ``path`` does not exist.
        OSError: The temporary file cannot be written.
        ValueError: There is no format of that name.
    """
    ids = Interned()
    outline = Outline(ids)
    rows = checked_rows(
        path,
        image_root,
        format=format,
        check_images=check_images,
        allow_outside_images=allow_outside_images,
        bad_rows=bad_rows,
        ids=ids,
    )
    root = path.parent if image_root is None else Path(image_root)
    spool: Spool | None = None
    name = format
    faults: list[tuple[int, DataError | int]] = []
    waiting: list[StepExample] = []

    def check_waiting() -> None:
        first = len(outline) - len(waiting)
        found = check(waiting) if check is not None else ()
        faults.extend((first + n, error) for n, error in enumerate(found) if error is not None)
        waiting.clear()

    for row in rows:
        if not len(outline):
            name, spool = row.format, Spool() if row.span is None else None
        span = row.span if spool is None else spool.append(row.record)
        assert span is not None  # a JSONL file has one for every row
        for candidate, example in zip(row.kept, row.examples, strict=True):
            outline.add(example, Place(row.line, span), candidate)
            waiting.append(example)
        if len(waiting) >= _AT_ONCE:
            check_waiting()
    check_waiting()
    if spool is not None:
        spool.complete()
    source = JsonlFile(path) if spool is None else spool
    return StoredExamples(path, root, name, source, outline), faults
