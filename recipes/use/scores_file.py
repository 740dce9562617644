"""``scores.jsonl``: the step scores of every solution, one solution on each line.

    {"id": ..., "group": ..., "answer": ..., "correct": ..., "step_scores": [...], "scores": {...}}

``scores`` holds the solution's score by every aggregation. A solution that was longer than the
model's context has ``steps`` too, the number of its steps, of which the first alone have scores.
The file ``<name>.settings.json`` beside
it records the model, data and settings of the scores and the number of solutions, and a complete
file has its digest beside it (``prm.digests``). Lines are in the order of the data, and a line is
complete once it ends with a line break, so an interrupted file can be continued.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from prm.conventions import Conventions
from prm.data.bad_rows import BadRows
from prm.data.interned import Interned
from prm.data.json_rows import json_line
from prm.digests import check_digest, digest_file, digest_path
from prm.names import AggregationName
from prm.schema import DataError
from recipes.options.values import OptionError
from recipes.run.files import note_unchecked

USE = "use"
"""The key of the settings under which aggregation and threshold of the model stand."""

_BLOCK = 2**20
_REMEDY = "write the file with `bilevel-prm score`"


@dataclass(frozen=True)
class ScoredSolution:
    """A line of a scores file.

    Attributes:
        id: The id of the solution.
        step_scores: The probability of "+" at every step.
        scores: The score of the solution, by the name of the aggregation.
        group: The question of the solution, None if the data do not name it.
        answer: The final answer, None if the data do not name it.
        correct: Whether the answer is right, None if the data do not tell.
        steps: The number of steps of a solution of which only the first have scores, else None.
    """

    id: str
    step_scores: tuple[float, ...]
    scores: Mapping[str, float]
    group: str | None = None
    answer: str | None = None
    correct: bool | None = None
    steps: int | None = None

    @property
    def all_steps(self) -> int:
        """The number of steps of the solution, with and without scores."""
        return len(self.step_scores) if self.steps is None else self.steps

    def line(self) -> str:
        """Return the text of the line, whose floats are read back exactly."""
        optional = {"group": self.group, "answer": self.answer, "correct": self.correct}
        record = {
            "id": self.id,
            **{name: value for name, value in optional.items() if value is not None},
            **({} if self.steps is None else {"steps": self.steps}),
            "step_scores": list(self.step_scores),
            "scores": dict(self.scores),
        }
        return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def settings_path(scores: Path) -> Path:
    """Return the path of the settings of a scores file."""
    return scores.with_name(scores.name + ".settings.json")


def read_settings(scores: Path) -> Mapping[str, Any]:
    """Return the settings beside a scores file, empty if there are none.

    Raises:
        DataError: The file holds no settings.
    """
    path = settings_path(scores)
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(expected="JSON", found=str(error), file=path) from error
    if not isinstance(settings, dict) or not all(
        isinstance(settings.get(name, {}), dict) for name in ("model", USE)
    ):
        raise DataError(
            expected=f'a JSON object with objects "model" and "{USE}"',
            found=type(settings).__name__,
            file=path,
            remedy="write scores and settings with `bilevel-prm score`",
        )
    return settings


def use_of(scores: Path) -> tuple[AggregationName, float]:
    """Return the aggregation and the threshold of the model that made a scores file.

    They are "mean" and 1/2 if the settings beside the file do not name them.

    Raises:
        DataError: The settings name others than there are.
    """
    use = {"aggregation": "mean", "threshold": 0.5, **read_settings(scores).get(USE, {})}
    try:
        read = Conventions(plus_id=0, minus_id=1, **use)
    except (TypeError, ValueError) as error:
        raise DataError(
            expected="aggregation and threshold of the model",
            found=str(error),
            file=settings_path(scores),
            field=USE,
            remedy="write scores and settings with `bilevel-prm score`",
        ) from error
    return read.aggregation, read.threshold


def read_scores(path: Path) -> list[ScoredSolution]:
    """Read all lines of a complete scores file; a note says if nothing tells that it is complete.

    Raises:
        OptionError: There is no such file.
        DataError: A line is malformed (the error names file, line and field), an id occurs twice,
            solutions are missing, or the file is not as it was written.
    """
    return [row for _, row in numbered_scores(path, BadRows(path))]


def numbered_scores(path: Path, bad: BadRows) -> Iterator[tuple[int, ScoredSolution]]:
    """Yield the solutions of a complete scores file, each with its line.

    Args:
        path: The file.
        bad: What refuses malformed lines, and ids that occur before, or leaves them out.

    Raises:
        OptionError: There is no such file.
        DataError: A line is refused; or at the end, solutions are missing, or the file is not as it
            was written.
    """
    if not path.is_file():
        raise OptionError(f"{path}: no such file; {_REMEDY}")
    checked = check_digest(path)
    expected = read_settings(path).get("solutions")
    ids, lines = Interned(), array("q")
    for line, row in _rows(path):
        bad.rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            number = ids.add(row.id)
            if number < len(lines):
                known = f"an id of its own, not that of line {lines[number]}"
                _fail(path, line, "id", known, row.id)
        except DataError as error:
            bad.add(error)
            continue
        lines.append(line)
        yield line, row
    if isinstance(expected, int) and (bad.rows != expected or not checked):
        raise DataError(
            expected=f"the scores of {expected} solutions, and the digest of the complete file",
            found=f"{bad.rows}{'' if checked else f', without {digest_path(path).name}'}",
            file=path,
            remedy="call `bilevel-prm score` again as before: it goes on where it stopped",
        )
    if not bad.rows:
        raise DataError(expected="a line per solution", found="an empty file", file=path)
    note_unchecked(path)


def is_of_file(scores: Path, data: Path) -> bool | None:
    """Return whether scores were made from this very file; None if nothing beside them tells."""
    made_from = read_settings(scores).get("file")
    digest = made_from.get("sha256") if isinstance(made_from, dict) else None
    return digest == digest_file(data) if isinstance(digest, str) and data.is_file() else None


def scores_for(
    path: Path, index: Mapping[str, int], data: Path, *, some_left_out: bool = False
) -> Iterator[tuple[int, ScoredSolution]]:
    """Yield the lines of a scores file for the solutions of ``data``, each with its row there.

    Args:
        path: The scores file.
        index: The row of every id of the data.
        data: The path of the data.
        some_left_out: Whether rows of the data were left out. Scores of other solutions are then
            theirs, if the file was made from these data.

    Raises:
        DataError: At the end: a solution has no scores, or the file holds scores of other
            solutions. Before it: see ``read_scores``.
    """
    found = bytearray(len(index))
    more = 0
    for _, solution in numbered_scores(path, BadRows(path)):
        row = index.get(solution.id)
        if row is None:
            more += 1
        else:
            found[row] = True
            yield row, solution
    if more and some_left_out and is_of_file(path, data):
        more = 0
    if (missing := found.count(0)) or more:
        first = found.find(0)
        name = next((name for name, row in index.items() if row == first), None)
        raise DataError(
            expected=f"scores of the {len(index)} solutions of {data}",
            found=f"none for {missing} of them"
            + (f" (for example {name!r})" if missing else "")
            + f", and {more} of other solutions",
            file=path,
            remedy="score this file, to the end",
        )


def complete_lines(path: Path, ids: Iterable[str], data: Path) -> int:
    """Remove an incomplete last line, and count the solutions of an interrupted file.

    Args:
        path: The scores file.
        ids: The ids of all solutions of the data, in order.
        data: The path of the data, for messages.

    Raises:
        DataError: A complete line is malformed, or belongs to another solution than expected.
    """
    with path.open("rb+") as file:
        file.truncate(_end_of_lines(file))
    done = 0
    coming = iter(ids)
    for line, row in _rows(path):
        if isinstance(row, DataError):
            raise row
        name = next(coming, None)
        if row.id != name:
            expected = "no further line" if name is None else f"the scores of {name!r}"
            _fail(path, line, "id", f"{expected}, by the order of {data}", row.id)
        done += 1
    return done


def _end_of_lines(file: IO[bytes]) -> int:
    """Return the offset behind the last line break of a file, which is not held whole."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def _rows(path: Path) -> Iterator[tuple[int, ScoredSolution | DataError]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            try:
                yield line, _parse(json_line(raw, path, line), path, line)
            except DataError as error:
                yield line, error.copy(file=path, line=line, remedy=_REMEDY)


def _parse(record: Any, path: Path, line: int) -> ScoredSolution:
    def fail(field: str | None, expected: str, found: Any) -> NoReturn:
        _fail(path, line, field, expected, found)

    if not isinstance(record, dict):
        fail(None, "a JSON object", record)
    if not isinstance(record.get("id"), str) or not record["id"]:
        fail("id", "a string", record.get("id"))
    for name in ("group", "answer"):
        if not isinstance(record.get(name), str | None):
            fail(name, "a string, or no such field", record[name])
    if not isinstance(record.get("correct"), bool | None):
        fail("correct", "true, false, or no such field", record["correct"])
    steps = record.get("step_scores")
    if not isinstance(steps, list) or not steps:
        fail("step_scores", "a list of at least one number", steps)
    for number, value in enumerate(steps):
        if not _is_number(value) or not 0 <= value <= 1:
            fail(f"step_scores[{number}]", "a number in [0, 1]", value)
    total = record.get("steps")
    if total is not None and (type(total) is not int or total <= len(steps)):
        fail("steps", f"a number above that of the step scores, {len(steps)}, or no field", total)
    scores = record.get("scores")
    if not isinstance(scores, dict) or not scores:
        fail("scores", "an object with a number per aggregation", scores)
    for name, value in scores.items():
        if not _is_number(value):
            fail(f"scores.{name}", "a finite number", value)
    return ScoredSolution(
        id=record["id"],
        step_scores=tuple(map(float, steps)),
        scores={name: float(value) for name, value in scores.items()},
        group=record.get("group"),
        answer=record.get("answer"),
        correct=record.get("correct"),
        steps=total,
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _fail(path: Path, line: int, field: str | None, expected: str, found: Any) -> NoReturn:
    shown = found if isinstance(found, str) and field is None else repr(found)
    raise DataError(
        expected=expected,
        found="nothing" if found is None else shown[:80],
        file=path,
        line=line,
        field=field,
        remedy=_REMEDY,
    )
