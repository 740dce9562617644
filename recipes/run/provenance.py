"""What a run or a measurement was made with: code, packages, machine, data.

Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("bilevel-prm", "torch", "transformers", "torchopt", "safetensors", "numpy", "pillow")
_BLOCK = 2**20
_FILES = ("train_file", "meta_file", "dev_file", "test_file", "weights_file")
_ROOT = Path(__file__).resolve().parents[2]


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


def machine() -> dict[str, Any]:
    """Return the architecture, the processor, and the numbers of CPUs and of torch's threads."""
    import torch

    return {
        "architecture": platform.machine(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def git_state(root: Path = _ROOT) -> dict[str, Any] | None:
    """Return the commit of a checkout and whether its files differ; None: it is no checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    # An installed package may lie in somebody else's repository.
    if top is None or commit is None or Path(top).resolve() != root:
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def data_fingerprints(options: Any) -> dict[str, dict[str, Any]]:
    """Fingerprint of every data file that ``options`` name, by the option."""
    named = {name: getattr(options, name, None) for name in _FILES}
    return {name: fingerprint(Path(path)) for name, path in named.items() if path is not None}


def fingerprint(path: Path) -> dict[str, Any]:
    """Read a file once: path, size, SHA-256 of its first and last MiB, and number of lines."""
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
    # Waited for however busy the machine is: a time limit would leave out the commit by chance. And
    # without git's optional locks, which would get into the way of a commit that is being made.
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
