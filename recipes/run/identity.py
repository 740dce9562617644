"""Which run a checkpoint belongs to: options, and digests of the initial model and the data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recipes.options.flat import flat_options, flatten
from recipes.options.train import LowerOptions


def identity(options: LowerOptions, model: torch.nn.Module) -> dict[str, Any]:
    """What a run is: its options, and digests of the initial model and of the files it trains on.

    What a resumed run may change is said where the options are defined (``on_resume``). Of files
    the content counts, and of the model its parameters, wherever they lie. Reads every parameter
    and every file once.
    """
    entries, values = flat_options(type(options)), flatten(options)
    same = {name: value for name, value in values.items() if entries[name].on_resume == "same"}
    files = {name: path for name, path in values.items() if entries[name].on_resume == "file"}
    return {
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in same.items()},
        "files": {name: digest_file(path) for name, path in files.items() if path is not None},
        "model": digest_model(model),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words, the earlier one in brackets."""
    lines = []
    old, new = then["options"], now["options"]
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            lines.append(f"{_flag(name)} {new.get(name)} (checkpoint: {old.get(name)})")
    for name in dict.fromkeys([*then["files"], *now["files"]]):
        if then["files"].get(name) != now["files"].get(name):
            lines.append(f"{_flag(name)} (checkpoint: a file of other content)")
    if then["model"] != now["model"]:
        lines.append("--model, --init-from (checkpoint: other initial parameters)")
    return lines


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_model(model: torch.nn.Module) -> str:
    """SHA-256 of all parameters and buffers, with names, types and shapes, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
