"""The identity of a run: its options, and digests of its initial model and data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from prm.data_urls import is_embedded
from prm.digests import digest_file
from prm.placement import resolve
from prm.tensor_cache import digest_tensors
from recipes.options.base import flag_of
from recipes.options.flat import flat_options, flatten
from recipes.options.train import LowerOptions
from recipes.options.values import launched_precision

_ADDED: Mapping[str, Any] = {
    "frozen_activations": "none",
    "lora_rank": 0,
    "lora_targets": [],
    "precision": "float32",
    "sharding": "none",
    "tokens_per_batch": 2**16,
    "too_long": "refuse",
    "upper_gradient_every": 1,
}
"""Options that checkpoints of version 0.1 lack, with what their runs did."""

_PART = 2**14
_AT_ONCE = 16


def identity(
    options: LowerOptions,
    model: torch.nn.Module | str,
    pictures: Mapping[str, Iterable[Path]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return a run's options, and digests of its initial model and of the files it trains on.

    The options define what a resumed run may change (``on_resume``); of the precision it is what
    "auto" stands for on this device. Files are compared by their
    content, pictures by ``digest_pictures`` and the model by its parameters, so all may move. Every
    parameter and every file is read once, and of every picture a part.

    Args:
        options: The options of the run.
        model: The model before the first step, or its digest, as no process may have all of it.
        pictures: The pictures of the files, by the flat name of the option.
    """
    entries, values = flat_options(type(options)), flatten(options)
    same = {name: value for name, value in values.items() if entries[name].on_resume == "same"}
    precision = launched_precision(options.placement.precision)
    same["precision"] = resolve(options.placement.device, precision).precision
    files = {name: path for name, path in values.items() if entries[name].on_resume == "file"}
    return {
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in same.items()},
        "files": {name: digest_file(path) for name, path in files.items() if path is not None},
        "pictures": {name: digest_pictures(paths) for name, paths in pictures.items()},
        "model": model if isinstance(model, str) else digest_model(model),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two identities in words, with the earlier value in brackets."""
    lines = []
    old, new = then["options"], now["options"]
    for name in dict.fromkeys([*old, *new]):
        earlier = old.get(name, _ADDED.get(name))
        if earlier != new.get(name):
            lines.append(f"{flag_of(name)} {new.get(name)} (checkpoint: {earlier})")
    for name in dict.fromkeys([*then["files"], *now["files"]]):
        if then["files"].get(name) != now["files"].get(name):
            lines.append(f"{flag_of(name)} (checkpoint: a file of other content)")
    seen, found = then.get("pictures", {}), now.get("pictures", {})  # older runs have none
    lines += [
        f"{flag_of(name)} (checkpoint: pictures of other content)"
        for name in seen
        if name in found and seen[name] != found[name]
    ]
    if then["model"] != now["model"]:
        lines.append("--model, --init-from (checkpoint: other initial parameters)")
    return lines


def digest_pictures(paths: Iterable[Path]) -> str:
    """Return a SHA-256 of pictures in their order, each at its first place, in hexadecimal.

    Of every file its size enters, and its first, middle and last 16 KiB: all of a small one. A PNG
    ends with a sum over its pixels, and nearly every change of a JPEG changes its size, but a
    change in the midst of a large uncompressed picture can remain unnoticed. Pictures in the
    record itself are part of its file and are left out.
    """
    files = [path for path in dict.fromkeys(paths) if not is_embedded(path)]
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for part in pool.map(_parts, files):
            digest.update(part)
    return digest.hexdigest()


def _parts(path: Path) -> bytes:
    """Return the digest of a picture; one that is gone since it was checked is named by its use."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            starts = (0, (size - _PART) // 2, size - _PART) if size > 3 * _PART else (0,)
            for start in starts:
                file.seek(start)
                digest.update(file.read(_PART if len(starts) > 1 else size))
            return digest.digest()
    except OSError:
        return bytes(32)


def digest_model(model: torch.nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers with names, types and shapes, in hex."""
    return digest_tensors(model.state_dict())
