"""The run directory: create it, find a free one, and describe a new run in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prm.files import UNFINISHED
from recipes.options.flat import flatten
from recipes.options.parse import to_yaml
from recipes.options.values import OptionError
from recipes.run.files import check_writable, write_json, write_text
from recipes.run.provenance import data_fingerprints, environment

_LEFT = (UNFINISHED, ".tmp")
"""Suffixes of what killed writers leave; the second is that of version 0.1.0."""
LOCK = "lock"
"""Name of the file that names the process at work in the directory (``recipes.run.lock``)."""


def make_directory(path: Path) -> None:
    """Create a directory, unless it exists.

    Raises:
        OptionError: There is a file at ``path``.
    """
    if path.exists() and not path.is_dir():
        raise OptionError(f"--output-dir {path}: exists and is not a directory; choose another")
    path.mkdir(parents=True, exist_ok=True)


def check_directory(options: Any) -> None:
    """Find out before a run loads anything whether its directory can be written.

    Raises:
        WriteError: It cannot.
    """
    path = Path(options.output_dir)
    if options.run.resume is None:
        path = free_directory(path, options.on_existing)
    check_writable("--output-dir", path / "args.yaml")


def describe_run(path: Path, options: Any) -> None:
    """Write ``args.yaml`` and ``env.json`` into the directory of a new run.

    Raises:
        OptionError: The directory is not empty: it holds a run or other files.
    """
    if _holds_something(path):
        what = "already holds a run" if (path / "args.yaml").exists() else "is not empty"
        raise OptionError(
            f"--output-dir {path}: {what}; nothing was overwritten. Choose another directory or "
            "remove this one"
        )
    write_json(path / "env.json", {**environment(), "data": data_fingerprints(flatten(options))})
    write_text(path / "args.yaml", to_yaml(options))


def free_directory(path: Path, on_existing: str) -> Path:
    """Return the directory for a new run.

    Args:
        path: The directory that the options name.
        on_existing: With "refuse", ``path`` itself is returned, even if it is not empty. With
            "number", the first of path, path-2, path-3, ... that is still free.
    """
    if on_existing == "refuse":
        return path
    number, candidate = 1, path
    while candidate.exists() and (not candidate.is_dir() or _holds_something(candidate)):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _holds_something(path: Path) -> bool:
    """Return whether there is more than a run killed before it wrote ``args.yaml`` leaves."""
    return any(
        entry.name not in (LOCK, "env.json") and entry.suffix not in _LEFT
        for entry in path.iterdir()
    )
