"""The run directory: what a run was, what it logged, what it found (design: the run contract)."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from recipes.options.flat import flatten
from recipes.options.parse import to_yaml
from recipes.options.values import OptionError
from recipes.run.provenance import data_fingerprints, git_state

_PACKAGES = ("bilevel-prm", "torch", "transformers", "torchopt", "safetensors", "numpy", "pillow")


LOCK = "lock"  # of the process that works in the directory: recipes.run.lock


def make_directory(path: Path) -> None:
    """Make ``path``, unless it is there.

    Raises:
        OptionError: it is a file.
    """
    if path.exists() and not path.is_dir():
        raise OptionError(f"--output-dir {path}: exists and is not a directory; choose another")
    path.mkdir(parents=True, exist_ok=True)


def describe_run(path: Path, options: Any) -> None:
    """Write ``args.yaml`` and ``env.json`` into the directory of a new run.

    Raises:
        OptionError: ``path`` holds a run already, or anything else.
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
    """``path``, or with "number" the first of path, path-2, path-3, ... that holds nothing yet."""
    if on_existing == "refuse":
        return path
    number, candidate = 1, path
    while candidate.exists() and (not candidate.is_dir() or _holds_something(candidate)):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _holds_something(path: Path) -> bool:
    """Whether there is more than what a run that was killed before its first line leaves behind."""
    return any(
        entry.name not in (LOCK, "env.json") and entry.suffix != ".tmp" for entry in path.iterdir()
    )


def environment() -> dict[str, Any]:
    """Versions and machine, for bug reports and for comparing runs."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return {
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "packages": versions,
        "git": git_state(),
    }


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or complete: other name first, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """``write_text`` of indented JSON; NaN is refused, it is not JSON."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
