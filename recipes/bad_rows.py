"""What commands do with rows that they cannot use, and the list of those that they leave out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def report_bad_rows(
    several: Sequence[BadRows], output: Path | None, tell: Callable[[str], None]
) -> None:
    """Tell of several files what was left out, and of which solutions the first steps are kept.

    Both are listed beside ``output``. Where there is nothing to list, an older list is removed,
    which would be taken for that of the new output. Without an output nothing is told: there is
    nothing to tell then (``recipes.run.files.need_output_for_lists``).

    Raises:
        OSError: A list cannot be written.
    """
    if output is None:
        return
    listed = skipped_path(output)
    lost = [bad for bad in several if bad.left_out]
    if not lost:
        listed.unlink(missing_ok=True)
    else:
        write_bad_rows(listed, lost)
        for bad in lost:
            tell(f"{bad}, listed in {listed}")
    listed = truncated_path(output)
    cut = [bad for bad in several if bad.truncated]
    if not cut:
        listed.unlink(missing_ok=True)
        return
    write_lines(listed, (row.line_of_json() for bad in cut for row in bad.truncated))
    for bad in cut:
        tell(
            f"{bad.path}: {len(bad.truncated):,} solutions are longer than the model's context; "
            f"their first steps alone are used, listed in {listed}"
        )


def truncated_path(output: Path) -> Path:
    """Return the path of the list of what was cut, beside an output."""
    return output.parent / (output.name + TRUNCATED)


def skipped_path(output: Path) -> Path:
    """Return the path of the list of what was left out, beside an output."""
    return output.parent / (output.name + SKIPPED)
