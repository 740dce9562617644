"""The run directory: create it, find a free one, and describe a new run in it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from prm.files import UNFINISHED
from recipes.options.base import OF_MODEL
from recipes.options.flat import flat_options, flatten
from recipes.options.parse import command_of, saved_options, to_yaml
from recipes.options.rules import words_of
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
    """Find out before a run loads anything whether its directory is free and can be written.

    Raises:
        OptionError: It holds a run or other files, or one to resume that is complete. The message
            says how an unfinished run goes on.
        WriteError: It cannot be written.
    """
    path = Path(options.output_dir)
    if options.run.resume is None:
        path = free_directory(path, options.on_existing)
        _refuse_existing(path, options)
    else:
        refuse_complete(path)
    check_writable("--output-dir", path / "args.yaml")


def refuse_complete(path: Path) -> None:
    """Refuse to resume the run in ``path`` if it is complete.

    Raises:
        OptionError: It has its results.
    """
    if (path / "results.json").exists():
        raise OptionError(f"--resume {path}: the run is complete, it has its results.json")


def describe_run(path: Path, options: Any) -> None:
    """Write ``args.yaml`` and ``env.json`` into the directory of a new run.

    Raises:
        OptionError: The directory is not empty: it holds a run or other files.
    """
    _refuse_existing(path, options)
    own = {"folder": os.getcwd(), "data": data_fingerprints(flatten(options))}
    write_json(path / "env.json", {**environment(), **own})
    write_text(path / "args.yaml", to_yaml(options))


def resume_command(names: Collection[str], path: Path) -> str:
    """Return the command that goes on with the run in ``path``.

    Args:
        names: The flat names of the options of the run.
        path: The run directory.
    """
    return shlex.join(["bilevel-prm", command_of(names), "--resume", str(path)])


def run_of(directory: str) -> dict[str, Any]:
    """Return the options of the run that holds a folder; none without an ``args.yaml``.

    Raises:
        OptionError: The ``args.yaml`` cannot be read.
    """
    run = Path(directory).parent
    return saved_options(run) if (run / "args.yaml").is_file() else {}


def _refuse_existing(path: Path, options: Any) -> None:
    """Refuse a directory for a new run that holds something.

    Raises:
        OptionError: It does.
    """
    if not path.is_dir() or not _holds_something(path):
        return
    found, remedy = "is not empty and holds no run", "Choose another directory"
    if (path / "results.json").exists():
        found = "already holds a run, which is complete"
    elif (path / "args.yaml").exists():
        there = saved_options(path)
        differ, free = _differences(there, options)
        command = resume_command(there, path)
        if differ:
            found = f"already holds an unfinished run with other options ({', '.join(differ)})"
            remedy = f"Choose another directory, or go on with that run: {command}"
        else:
            found = "already holds this run, unfinished"
            remedy = " ".join(["Go on with:", command, *map(shlex.quote, free)])
    raise OptionError(f"--output-dir {path}: {found}; nothing was overwritten. {remedy}")


def _differences(there: Mapping[str, Any], options: Any) -> tuple[list[str], list[str]]:
    """Compare options with those of a run.

    Returns:
        The options that a resumed run may not change and that differ, each with the value there;
        and the words that give a resumed run the others that differ.
    """
    entries, values = flat_options(type(options)), flatten(options)
    differ, free = [], []
    if command_of(there) != command_of(values):
        differ.append(f"of {command_of(there)}")
    for name, entry in entries.items():
        now, then = values[name], there.get(name, entry.default)
        then = tuple(then) if isinstance(then, list) else then
        same = now == then or (now is None and name in OF_MODEL)
        if entry.path and isinstance(then, str) and isinstance(now, str):
            same = os.path.abspath(now) == os.path.abspath(then)
        if same or name in ("output_dir", "on_existing", "resume"):
            continue
        if entry.on_resume == "free":
            free += words_of(name, now)
        else:
            differ.append(f"{' '.join(words_of(name, now))}, there {then}")
    return differ, free


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
