"""Where a run comes from: the commit of the code, fingerprints of the data. Without torch."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCK = 2**20
_FILES = ("train_file", "meta_file", "dev_file", "test_file", "weights_file")
_ROOT = Path(__file__).resolve().parents[2]


def git_state(root: Path = _ROOT) -> dict[str, Any] | None:
    """Commit of the checkout that ``root`` is, and whether files of it differ; None: it is none."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    # An installed package may lie in somebody else's repository.
    if top is None or commit is None or Path(top).resolve() != root:
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def data_fingerprints(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fingerprint of every data file that options name, by the flat name of the option."""
    named = {name: options.get(name) for name in _FILES}
    return {name: fingerprint(Path(path)) for name, path in named.items() if path is not None}


def fingerprint(path: Path) -> dict[str, Any]:
    """Path, size, SHA-256 of the first and the last MiB, and number of lines (one read)."""
    digest, lines = hashlib.sha256(), 0
    with path.open("rb") as file:
        first = last = block = file.read(_BLOCK)
        while block:
            lines += block.count(b"\n")
            last = (last + block)[-_BLOCK:] if block is not first else block
            block = file.read(_BLOCK)
        digest.update(first + last)
        size = file.tell()
    lines += size > 0 and not last.endswith(b"\n")
    return {"path": str(path), "bytes": size, "sha256_of_ends": digest.hexdigest(), "lines": lines}


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
