"""Which run a checkpoint belongs to: options, and digests of the initial model and the data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from recipes.options.train import LowerOptions

# What decides nothing about the steps of a run, ...
_FREE = {
    *("resume", "output_dir", "on_existing", "progress", "threads", "workers"),
    *("log_every", "save_every", "keep_checkpoints", "on_trouble"),
    *("dev_file", "test_file", "sanity_check"),
}
# ... and what says where the model and the data are: their content is compared instead.
_FILES = ("train_file", "meta_file", "weights_file")
_PLACES = {*_FILES, "model", "init_from", "image_root"}


def identity(options: LowerOptions, model: torch.nn.Module) -> dict[str, Any]:
    """What a run is: its options, and digests of the initial model and of the files it trains on.

    Reads every parameter and every file once.
    """
    decisive = [f.name for f in fields(options) if f.name not in _FREE | _PLACES]
    files = {name: getattr(options, name, None) for name in _FILES}
    values = {name: getattr(options, name) for name in decisive}
    return {
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
        "files": {name: digest_file(path) for name, path in files.items() if path is not None},
        "model": digest_model(model),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words, the earlier one in brackets."""
    found = []
    old, new = then["options"], now["options"]
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            found.append(f"{_flag(name)} {new.get(name)} (checkpoint: {old.get(name)})")
    for name in dict.fromkeys([*then["files"], *now["files"]]):
        if then["files"].get(name) != now["files"].get(name):
            found.append(f"{_flag(name)} (checkpoint: a file of other content)")
    if then["model"] != now["model"]:
        found.append("--model, --init-from (checkpoint: other initial parameters)")
    return found


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
