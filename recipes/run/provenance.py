"""The provenance of a run or a measurement: code, packages, machine, data.

Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = "bilevel-prm"
_PACKAGES = ("torch", "transformers", "torchopt", "safetensors", "numpy", "pillow", "tokenizers")
_EXTRAS = (
    *("scikit-learn", "peft", "pyarrow", "zstandard", "math-verify", "matplotlib", "jinja2"),
    *("fastapi", "uvicorn", "tensorboard", "trackio", "wandb", "gguf", "accelerate", "psutil"),
)
_BLOCK = 2**20
_FILES = ("train_file", "meta_file", "dev_file", "test_file", "weights_file")
_ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, Any]:
    """Return versions and the machine, for bug reports and to compare runs.

    ``bilevel-prm env`` prints them, and ``env.json`` of a run holds them.
    """
    import torch

    return {
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "devices": _devices(),
        "packages": {name: version_of(name) for name in (PACKAGE, *_PACKAGES, *_EXTRAS)},
        "git": git_state(),
    }


def environment_text() -> str:
    """Return ``environment`` as lines for a bug report."""
    values = environment()
    git = values["git"]
    commit = "no checkout" if git is None else git["commit"]
    if git is not None and git["dirty"]:
        commit += ", with changes"
    lines = {
        PACKAGE: values["packages"].pop(PACKAGE),
        "commit": commit,
        "python": values["python"],
        "platform": values["platform"],
        "CPUs": f"{values['cpus']}, {values['threads']} threads of torch",
        "devices": ", ".join(values["devices"]) or "none",
        "CUDA": values["cuda"] or "none",
        **values["packages"],
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def version_of(package: str) -> str:
    """Return the version of a distribution, or a text that it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package" if package == PACKAGE else "not installed"


def _devices() -> list[str]:
    """Return the accelerators that torch can use, by kind and name."""
    import torch

    devices = [f"cuda: {torch.cuda.get_device_name(n)}" for n in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    devices += [f"xpu: {torch.xpu.get_device_name(n)}" for n in range(torch.xpu.device_count())]
    return devices


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
    """Return the commit of a checkout and whether files differ from it, or None without one."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    # An installed package may lie in somebody else's repository.
    if top is None or commit is None or Path(top).resolve() != root:
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def data_fingerprints(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return fingerprints of the data files that options name, by the option's flat name."""
    named = {name: options.get(name) for name in _FILES}
    return {name: fingerprint(Path(path)) for name, path in named.items() if path is not None}


def fingerprint(path: Path) -> dict[str, Any]:
    """Return path, size, SHA-256 of all and of the first and last MiB, and lines of a file."""
    digest, whole, lines = hashlib.sha256(), hashlib.sha256(), 0
    with path.open("rb") as file:
        first = last = block = file.read(_BLOCK)
        while block:
            whole.update(block)
            lines += block.count(b"\n")
            last = (last + block)[-_BLOCK:] if block is not first else block
            block = file.read(_BLOCK)
        digest.update(first + last)
        size = file.tell()
    lines += size > 0 and not last.endswith(b"\n")
    return {
        "path": str(path),
        "bytes": size,
        "sha256": whole.hexdigest(),
        "sha256_of_ends": digest.hexdigest(),
        "lines": lines,
    }


def _git(root: Path, *words: str) -> str | None:
    # There is no time limit, because on a busy machine it would leave out the commit by chance.
    # Git's optional locks are off, because they could block a commit that is being written.
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
