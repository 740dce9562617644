"""Rows that stand inside one object: in its lists, or column by column as a table.

One object that is no record but holds lists of records is read as these. Of other objects the error
says where their rows are, or how a table of columns is written row by row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from prm.data.record_fields import Location, Words

IsRecord = Callable[[Mapping[str, Any]], bool]
"""Whether an object looks like a record of a format that is expected."""
_DEEPEST, _MOST, _SHOWN = 4, 100, 5
_SETS = {"train", "training", "dev", "val", "valid", "validation", "eval", "test", "testing"}
"""Names of lists that are apart on purpose."""
_BY_RECORDS = (
    "write it row by row, by pandas: read_json(...).to_json(..., orient='records', lines=True)"
)


def held_rows(
    record: object,
    location: Location,
    is_record: IsRecord,
    tell: Callable[[str], None] | None = None,
    *,
    alone: bool = True,
) -> list[Any] | None:
    """Return the rows that an object holds, None if it is itself a row or unknown.

    It holds rows if each of its fields is a list of objects, or, as the only object of a file, if
    one of them is a list of records. ``tell`` is told of several lists that become one set, and of
    other fields, which are not read.

    Raises:
        DataError: It is a table by columns, or holds records elsewhere, or sets that are kept
            apart, such as "train" and "test"; the error says where.
    """
    if isinstance(record, dict) and not is_record(record):
        lists = {key: held for key, held in record.items() if _holds_objects(held)}
        if lists and all(held == [] or key in lists for key, held in record.items()):
            if len(lists) > 1:
                _tell_several(lists, location, tell)
            return [inner for held in lists.values() for inner in held]
        named = [name for name, held in lists.items() if is_record(held[0])]
        if alone and named and len(list(_paths(record, is_record))) == 1:
            if tell is not None:
                others = ", ".join(repr(key) for key in list(record)[:_SHOWN] if key not in named)
                what = f"the rows of {named[0]!r} are read; {others} beside them are not"
                tell(f"{location.file}: {what}")
            return list(lists[named[0]])
    refuse_nested(record, location, is_record)
    return None


def _tell_several(
    lists: Mapping[str, list[Any]], location: Location, tell: Callable[[str], None] | None
) -> None:
    """Say that several lists of rows are read as one set; refuse those of a division."""
    if any(name.lower() in _SETS for name in lists):
        paths = [f"{_step(name, '')}[]" for name in lists]
        _refuse_paths(paths, location)
    if tell is not None:
        names = ", ".join(map(repr, list(lists)[:_SHOWN])) + (
            ", ..." if len(lists) > _SHOWN else ""
        )
        tell(f"{location.file}: the rows of {len(lists):,} lists ({names}) are read as one set")


def refuse_nested(record: object, location: Location, is_record: IsRecord) -> None:
    """Refuse an object that is no row but a table by columns, or holds records inside.

    Raises:
        DataError: It is one; the error says how the rows are taken out.
    """
    if not isinstance(record, dict) or not record:
        return
    _refuse_columns(record, location, is_record)
    if not is_record(record) and (paths := list(_paths(record, is_record))):
        _refuse_paths(paths, location)


def refuse_empty(record: object, location: Location, is_record: IsRecord) -> None:
    """Refuse an object that is no row but holds lists without a row.

    Raises:
        DataError: It is one.
    """
    if isinstance(record, dict) and record and all(held == [] for held in record.values()):
        names = ", ".join(map(repr, list(record)[:_SHOWN]))
        if not is_record(record):
            remedy = "check that the file was written completely"
            location.refuse(None, "at least one row", Words(f"empty lists ({names})"), remedy)


def _refuse_columns(record: Mapping[str, Any], location: Location, is_record: IsRecord) -> None:
    values = list(record.values())
    columns = all(isinstance(value, dict) and value for value in values)
    named = isinstance(record.get("id") or record.get("question"), dict)
    if columns and (all(map(_counts, values)) or (named and len(set(map(tuple, values))) == 1)):
        found = "an object of columns, as pandas' to_json writes a table by default"
    elif _counts(record) and all(isinstance(value, dict) for value in values):
        found = "an object of rows by number, as pandas' to_json(orient='index') writes a table"
    elif {"columns", "data"} <= record.keys() <= {"columns", "index", "data"}:
        found = "column names and values apart, as pandas' to_json(orient='split') writes a table"
    elif _has_columns(values) and (isinstance(record.get("id"), list) or not is_record(record)):
        found = f"an object of {len(values)} columns of {len(values[0])} values each"
    else:
        return
    _refuse(location, found, _BY_RECORDS)


def _refuse_paths(paths: list[str], location: Location) -> NoReturn:
    found = f"one object with rows at {', '.join(paths[:_SHOWN])}"
    _refuse(location, found, f"write them to a file alone, for example by: jq -c '{paths[0]}'")


def _refuse(location: Location, found: str, remedy: str) -> NoReturn:
    location.refuse(None, "one JSON object per row", Words(found), remedy)


def _counts(held: Mapping[str, Any]) -> bool:
    """Whether the keys are the numbers of rows, as pandas writes them."""
    return all(map(str.isdecimal, held))


def _has_columns(values: list[Any]) -> bool:
    lists = all(isinstance(value, list) and value and not _holds_objects(value) for value in values)
    return len(values) > 1 and lists and len({len(value) for value in values}) == 1


def _holds_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _paths(value: Any, is_record: IsRecord, before: str = "", depth: int = 0) -> Iterator[str]:
    """Yield where records are inside an object, in the notation of jq."""
    if depth == _DEEPEST:
        return
    if len(value) > 1 and all(
        isinstance(held, dict) and is_record(held) for held in value.values()
    ):
        yield f"{before or '.'}[]"
        return
    for key, held in list(value.items())[:_MOST]:
        if _holds_objects(held):
            inner, path = held[0], f"{before}{_step(key, before)}[]"
        elif isinstance(held, dict):
            inner, path = held, f"{before}{_step(key, before)}"
        else:
            continue
        if is_record(inner):
            yield path
        else:
            yield from _paths(inner, is_record, path, depth + 1)


def _step(key: str, before: str) -> str:
    if key.isascii() and key.isidentifier():
        return f".{key}"
    return f"{'' if before else '.'}[{json.dumps(key)}]"
