"""The files of a run directory as they are read afterwards; none of them has to be there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prm.data.json_rows import json_rows
from prm.data.reader import Row, iter_rows
from prm.schema import DataError, StepExample
from recipes.options.parse import saved_options
from recipes.options.values import OptionError


@dataclass(frozen=True)
class DataFile:
    """The file whose examples a run weighted.

    Attributes:
        path: The file, as it is seen from here.
        image_root: Folder that its image paths are relative to, None for the folder of ``path``.
        option: The flat name of the option that named it, ``train_file`` or ``meta_file``.
    """

    path: Path
    image_root: Path | None
    option: str

    def rows(self) -> Iterator[Row | DataError]:
        """Yield every row, or the error of one that cannot be used; images are not looked at."""
        return iter_rows(self.path, self.image_root)

    def examples(self) -> Iterator[StepExample]:
        """Yield the examples of the rows that can be used."""
        for row in self.rows():
            if isinstance(row, Row):
                yield from row.examples


def run_options(directory: Path) -> dict[str, Any]:
    """Return the options of a run of ``train``.

    Raises:
        OptionError: There is no such run.
    """
    if not (directory / "args.yaml").is_file():
        raise OptionError(f"{directory}: expected a run directory, found no args.yaml in it")
    return saved_options(directory)


def data_file(args: Mapping[str, Any], given: str | None = None) -> DataFile:
    """Return the file whose examples a run weighted, whether it is still there or not.

    Args:
        args: The options of the run.
        given: Its path now, if it is not what the options say.

    Raises:
        OptionError: The options name none.
    """
    name = "meta_file" if args.get("lower_data") == "meta" else "train_file"
    path = given if given is not None else args.get(name)
    if not isinstance(path, str):
        raise OptionError(f"args.yaml names no {name}; give --data")
    root = args.get("image_root")
    return DataFile(Path(path), None if root is None else Path(root), name)


def files_read(directory: Path, data: DataFile) -> tuple[Path, ...]:
    """Return what is read of a run, and its data file: no output may replace one of them."""
    found = (path for pattern in _WRITTEN_BY_RUNS for path in sorted(directory.glob(pattern)))
    return data.path, *found


_WRITTEN_BY_RUNS = (
    "args.yaml",
    "env.json",
    "results.json",
    "log.jsonl",
    "test_questions.jsonl",
    "*weights.jsonl",
    "*.sha256",
    "*.skipped.jsonl",
    "*.truncated.jsonl",
)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSONL file up to the first that is incomplete; none without a file.

    The log of a run that is at work, or was killed, may end within a line.
    """
    found: list[dict[str, Any]] = []
    if path.is_file() and path.stat().st_size:
        for _, entry in json_rows(path):
            if not isinstance(entry, dict):
                break
            found.append(entry)
    return found
