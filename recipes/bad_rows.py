"""What commands do with rows that they cannot use, and the list of those that they leave out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prm.data.bad_rows import BadRows, write_bad_rows
from prm.files import write_lines

SKIPPED = ".skipped.jsonl"
"""What the name of a list of rows that were left out ends with."""
TRUNCATED = ".truncated.jsonl"
"""What the name of a list of solutions ends with of which only the first steps are kept."""
_HINT = "mend it, or leave such rows out with --on-bad-row skip"


def bad_rows_of(options: Any, path: Path, tell: Callable[[str], None] | None = None) -> BadRows:
    """Return what takes the bad rows of a file, by ``on_bad_row`` and ``max_bad_rows``.

    ``tell`` takes notes on what is passed over beside the rows.
    """
    if options.on_bad_row == "refuse":
        return BadRows(path, hint=_HINT, tell=tell)
    return BadRows(path, "skip", options.max_bad_rows, tell=tell)


def report_bad_rows(several: Iterable[BadRows], output: Path, tell: Callable[[str], None]) -> None:
    """Tell what was left out of several files, and list it in the file ``output``, if anything was.

    If nothing was, an older list is removed, which would be taken for that of the new output.

    Raises:
        OSError: The list cannot be written.
    """
    lost = [bad for bad in several if bad.left_out]
    if not lost:
        output.unlink(missing_ok=True)
    else:
        write_bad_rows(output, lost)
        for bad in lost:
            tell(f"{bad}, listed in {output}")


def report_truncated(several: Iterable[BadRows], output: Path, tell: Callable[[str], None]) -> None:
    """Tell and list, as ``report_bad_rows`` does, the solutions of which the first steps are kept.

    Raises:
        OSError: The list cannot be written.
    """
    cut = [bad for bad in several if bad.truncated]
    if not cut:
        output.unlink(missing_ok=True)
        return
    write_lines(output, (row.line_of_json() for bad in cut for row in bad.truncated))
    for bad in cut:
        tell(
            f"{bad.path}: {len(bad.truncated):,} solutions are longer than the model's context; "
            f"their first steps alone are used, listed in {output}"
        )


def truncated_path(output: Path) -> Path:
    """Return the path of the list of what was cut, beside an output."""
    return output.parent / (output.name + TRUNCATED)


def skipped_path(output: Path) -> Path:
    """Return the path of the list of what was left out, beside an output."""
    return output.parent / (output.name + SKIPPED)
