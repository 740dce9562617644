"""A copy of the data file of a run, in its own format, with the weight of every row.

Rows are matched by the ids of their examples, and every one is accounted for: each weight has its
example, and a row without weights is one that the run left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prm.data.containers import table_kind
from prm.data.json_rows import json_rows
from prm.schema import DataError
from recipes.bad_rows import SKIPPED
from recipes.options.values import OptionError, existing_file
from recipes.report.outputs import new_output, pyarrow_for
from recipes.report.run_files import DataFile, files_read, lines_of
from recipes.report.run_weights import RunWeights
from recipes.run.files import refuse_other_kind
from recipes.run.provenance import fingerprint
from recipes.run.show import json_object

_REMEDY = "give the file that the run trained on as --data, or use --export"
Value = float | list[float] | None


@dataclass(frozen=True)
class Counts:
    """What was written: rows, how many of them have weights, how many the run left out."""

    rows: int
    weighted: int
    without: int


def annotate(
    weights: RunWeights,
    directory: Path,
    data: DataFile,
    name: str,
    column: str,
    *,
    overwrite: bool,
) -> Counts:
    """Write the copy. Of a JSONL file, every byte but those of the new field stays as it is.

    Args:
        weights: The weights of the run.
        directory: The run directory, whose lists say which rows the run left out.
        data: The data file: JSONL, a JSON array, Parquet or Arrow.
        name: The file to write.
        column: The name of the new field, which no row may have.
        overwrite: Whether an existing file is replaced.

    Raises:
        OptionError: The file exists, is the data file or one that the run wrote, or has the name
            of another kind of file; there is no data file.
        DataError: Weights and rows do not belong to each other, a row has the field already, or
            the file is of another form, for example compressed.
        ModuleNotFoundError: The file is a table, and the extra ``datasets`` is not installed.
        OSError: The file cannot be written.
    """
    path = existing_file(str(data.path))
    values = _row_values(weights, data, column, _left_out(directory, data))
    write = _writer(path, len(values))
    _check_name(path, Path(name))
    inputs = files_read(directory, data)
    with new_output("--annotate", name, overwrite=overwrite, inputs=inputs) as file:
        write(path, file, column, values)
    weighted = sum(value is not None for value in values)
    return Counts(len(values), weighted, len(values) - weighted)


def _check_name(source: Path, target: Path) -> None:
    """Refuse a name that says of the copy that it is of another kind than the data file."""
    kind = table_kind(source)
    if kind is None:
        refuse_other_kind("--annotate", target)
    elif target.suffix.lower() in _TEXT:
        raise OptionError(
            f"--annotate {target}: the copy is of the kind of the data file, {kind}; name it "
            f"{target.with_suffix(source.suffix)}"
        )


_TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".txt")


def _left_out(directory: Path, data: DataFile) -> frozenset[int]:
    """Return the lines that the run left out; none of a file that has changed since."""
    environment = json_object(directory / "env.json") or {}
    then = environment.get("data", {}).get(data.option, {})
    now = fingerprint(data.path)
    if any(then.get(name) != now[name] for name in ("bytes", "sha256_of_ends", "lines")):
        return frozenset()
    listed = lines_of(directory / f"{data.option.removesuffix('_file')}{SKIPPED}")
    return frozenset(entry["line"] for entry in listed if isinstance(entry.get("line"), int))


def _row_values(
    weights: RunWeights, data: DataFile, column: str, left_out: frozenset[int]
) -> list[Value]:
    """Return the value of every row, by its number."""
    by_id = dict(zip(weights.ids, weights.weight.tolist(), strict=True))
    found: list[list[float] | None] = []
    used = 0
    for row in data.rows():
        line = row.line or len(found) + 1
        if line == len(found):  # a candidate of the same row was wrong
            _refuse(data, line, "rows of which all solutions can be read", "one of which not all")
        if isinstance(row, DataError):
            if line not in left_out:
                raise row
            found.append(None)
            continue
        if column in row.record:
            _refuse(data, line, "a new field", f"{column!r} already", "name another by --column")
        known = [by_id.pop(example.id, None) for example in row.examples]
        own = [value for value in known if value is not None]
        if not own and line in left_out:
            found.append(None)
            continue
        if len(own) < len(known):
            lost = next(e.id for e, value in zip(row.examples, known, strict=True) if value is None)
            _refuse(data, line, "an example of the run, once", f"{lost!r}, which has no weight")
        used += len(own)
        found.append(own)
    if by_id:
        some = next(iter(by_id))
        _refuse(
            data, None, "every weighted example", f"{len(by_id):,} missing, for example {some!r}"
        )
    several = any(own is not None and len(own) > 1 for own in found)
    return [own if several or own is None else own[0] for own in found]


def _refuse(
    data: DataFile, line: int | None, expected: str, found: str, remedy: str = _REMEDY
) -> None:
    raise DataError(expected=expected, found=found, file=data.path, line=line, remedy=remedy)


_Writer = Callable[[Path, Path, str, Sequence[Value]], None]


def _writer(path: Path, rows: int) -> _Writer:
    """Return what writes a file like ``path``.

    Raises:
        DataError: The file is of another form.
    """
    kind = table_kind(path)
    if kind is not None:
        pyarrow_for("a table")
        return _TABLES[kind]
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"["):
            return _write_array
        file.seek(0)
        lines = sum(1 for _ in file) if start.startswith(b"{") else -1
    if lines != rows:
        raise DataError(
            expected="JSONL, a JSON array, Parquet or Arrow, as it can be written again",
            found="a file that is compressed, or rows within one object or over several lines",
            file=path,
            remedy="unpack it, or write it as one JSON object per line; or use --export",
        )
    return _write_lines


def _write_lines(source: Path, target: Path, column: str, values: Sequence[Value]) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        for number, (raw, value) in enumerate(zip(read, values, strict=True), start=1):
            body = raw.rstrip()
            if not body.endswith(b"}"):
                raise DataError(
                    expected="an object", found="another", file=source, line=number
                ) from None
            field = f", {json.dumps(column)}: {json.dumps(value)}}}".encode()
            written.write(body[:-1].rstrip() + field + raw[len(body) :])


def _write_array(source: Path, target: Path, column: str, values: Sequence[Value]) -> None:
    with target.open("w", encoding="utf-8", newline="\n") as written:
        before = "[\n"
        for (_, record), value in zip(json_rows(source), values, strict=True):
            row = {**record, column: value} if isinstance(record, Mapping) else record
            written.write(before + json.dumps(row, ensure_ascii=False))
            before = ",\n"
        written.write("\n]\n")


def _batches(arrow: Any, batches: Iterator[Any], column: str, values: Sequence[Value]) -> Any:
    """Yield batches of a table with the new column."""
    several = any(isinstance(value, list) for value in values)
    kind = arrow.list_(arrow.float64()) if several else arrow.float64()
    start = 0
    for batch in batches:
        own = arrow.array(values[start : start + batch.num_rows], type=kind)
        start += batch.num_rows
        schema = batch.schema.append(arrow.field(column, kind))
        yield arrow.RecordBatch.from_arrays([*batch.columns, own], schema=schema)


def _write_parquet(source: Path, target: Path, column: str, values: Sequence[Value]) -> None:
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(source) as read:
        groups = (read.read_row_group(number) for number in range(read.num_row_groups))
        writer = None
        for table in groups:
            rows = table.combine_chunks().to_batches()
            for batch in _batches(pyarrow, iter(rows), column, values[: table.num_rows]):
                writer = writer or parquet.ParquetWriter(target, batch.schema)
                writer.write_batch(batch)
            values = values[table.num_rows :]
        if writer is not None:
            writer.close()


def _write_arrow(source: Path, target: Path, column: str, values: Sequence[Value]) -> None:
    import pyarrow
    from pyarrow import ipc

    stream = table_kind(source) == "arrow stream"
    with pyarrow.OSFile(str(source)) as file, pyarrow.OSFile(str(target), "wb") as sink:
        read = ipc.open_stream(file) if stream else ipc.open_file(file)
        inner = iter(read) if stream else map(read.get_batch, range(read.num_record_batches))
        make = ipc.new_stream if stream else ipc.new_file
        writer = None
        written = 0
        for batch in _batches(pyarrow, inner, column, values):
            writer = writer or make(sink, batch.schema)
            writer.write_batch(batch)
            written += batch.num_rows
        if writer is not None:
            writer.close()
    if written != len(values):
        raise DataError(
            expected="one Arrow stream", found="several in a row", file=source, remedy=_REMEDY
        )


_TABLES: Mapping[str, _Writer] = {
    "parquet": _write_parquet,
    "arrow file": _write_arrow,
    "arrow stream": _write_arrow,
}
