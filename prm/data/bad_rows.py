"""Rows that cannot be used: the first one is refused, or all are left out, counted and listed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from prm.files import write_lines
from prm.names import OnBadRow
from prm.schema import DataError

MOST = 0.1
"""The default of the largest share of a file's rows that may be left out."""


@dataclass(frozen=True)
class BadRow:
    """A row, or a solution of it, that was left out.

    Attributes:
        file: The file.
        line: Line of a JSONL file, row of another, counted from 1.
        field: The field at fault, if one is.
        id: The id of the solution, None if the whole row is left out.
        reason: What was expected and found.
    """

    file: str
    line: int | None
    field: str | None
    id: str | None
    reason: str

    def line_of_json(self) -> str:
        """Return the row as a line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Truncated:
    """A solution that is longer than the model's context, of which the first steps are kept.

    Attributes:
        file: The file.
        line: Line of a JSONL file, row of another, counted from 1.
        id: The id of the solution.
        steps: The number of its steps.
        kept: The number of steps that are kept.
    """

    file: str
    line: int
    id: str
    steps: int
    kept: int

    def line_of_json(self) -> str:
        """Return the solution as a line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


class BadRows:
    """The bad rows of one file, and the solutions of which only the first steps are kept.

    A solution counts as its share of its row: one of four candidates as a quarter of a row.

    Args:
        path: The file.
        on_bad_row: "refuse" raises the error of a bad row, "skip" leaves the row out.
        most: The largest share of the rows that "skip" leaves out; a single row always may be, if
            the share is not 0.
        hint: The remedy of a refused error that has none.
        tell: Takes notes on what is passed over beside the rows.
    """

    def __init__(
        self,
        path: Path,
        on_bad_row: OnBadRow = "refuse",
        most: float = MOST,
        hint: str | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.path, self.tell = path, tell
        self.rows = 0
        self.left_out: list[BadRow] = []
        self.truncated: list[Truncated] = []
        self._skip, self._most, self._hint = on_bad_row == "skip", most, hint
        self._lost: Counter[int | None] = Counter()
        self._sizes: dict[int | None, int] = {}

    def add(self, error: DataError, id: str | None = None) -> None:
        """Leave out the row, or with ``id`` the solution, of an error.

        Raises:
            DataError: Bad rows are refused.
        """
        if not self._skip:
            raise error if error.remedy is not None else error.copy(remedy=self._hint)
        reason = f"expected {error.expected}, found {error.found}"
        file = str(error.file or self.path)
        self.left_out.append(BadRow(file, error.line, error.field, id, reason))
        self._lost[error.line] += 1

    def truncate(self, line: int, id: str, steps: int, kept: int) -> None:
        """Note that of a solution of ``steps`` steps the first ``kept`` are kept."""
        self.truncated.append(Truncated(str(self.path), line, id, steps, kept))

    def count(self, line: int, solutions: int) -> None:
        """Count a row of which ``solutions`` were read beside those that were left out."""
        size = solutions + self._lost[line]
        if self._skip and size > 1:  # otherwise nothing can be lost
            self._sizes[line] = size

    @property
    def lost(self) -> float:
        """Return the number of rows that were left out, solutions as their share of a row."""
        return sum(
            count / max(count, self._sizes.get(line, 1)) for line, count in self._lost.items()
        )

    def check(self) -> None:
        """Refuse a file of which too much was left out.

        Raises:
            DataError: More was left out than the share that may be.
        """
        lost = self.lost
        if lost > (max(1.0, self._most * self.rows) if self._most else 0.0):
            raise DataError(
                expected=f"at most {self._most:.3g} of the rows to be left out",
                found=f"{self._share()}; {self.first}",
                file=self.path,
                remedy="mend the file, or leave out more with --max-bad-rows",
            )

    @property
    def first(self) -> str:
        """Return where the first row that was left out stands, and why it was."""
        row = self.left_out[0]
        field = f", field {row.field}" if row.field else ""
        return f"the first is line {row.line}{field}: {row.reason}"

    def _share(self) -> str:
        lost = self.lost
        share = f"{100 * lost / max(self.rows, 1):.1f} %"
        return f"{lost:,.4g} of {self.rows:,} rows ({share})"

    def __str__(self) -> str:
        return f"{self.path}: {self._share()} left out"


def write_bad_rows(path: Path, several: Iterable[BadRows]) -> list[BadRow]:
    """Write the rows that were left out of several files, a JSON object a line; return them."""
    rows = [row for bad in several for row in bad.left_out]
    write_lines(path, (row.line_of_json() for row in rows))
    return rows
