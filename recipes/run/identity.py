"""The identity of a run: its options, and digests of its initial model and data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recipes.options.base import flag_of
from recipes.options.flat import flat_options, flatten
from recipes.options.train import LowerOptions


def identity(options: LowerOptions, model: torch.nn.Module) -> dict[str, Any]:
    """Return a run's options, and digests of its initial model and of the files it trains on.

    The options define what a resumed run may change (``on_resume``). Files are compared by their
    content and the model by its parameters, so both may move. Every parameter and every file is
    read once.
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
    """Return the differences of two identities in words, with the earlier value in brackets."""
    lines = []
    old, new = then["options"], now["options"]
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            lines.append(f"{flag_of(name)} {new.get(name)} (checkpoint: {old.get(name)})")
    for name in dict.fromkeys([*then["files"], *now["files"]]):
        if then["files"].get(name) != now["files"].get(name):
            lines.append(f"{flag_of(name)} (checkpoint: a file of other content)")
    if then["model"] != now["model"]:
        lines.append("--model, --init-from (checkpoint: other initial parameters)")
    return lines


def digest_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_model(model: torch.nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers with names, types and shapes, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()
