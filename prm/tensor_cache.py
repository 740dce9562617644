"""A folder of tensors that can be computed again: entries are used only where they are right.

An entry is a safetensors file, which holds beside its tensors their digest and the fingerprint of
what they were computed with. One that is missing, damaged or of another fingerprint is not there,
so that it is computed again. Entries appear complete or not at all (``prm.files``), so that several
processes may share a folder, and one that is killed leaves nothing that is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prm.files import atomic_write

_SUFFIX = ".safetensors"


def fingerprint_of(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of facts that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, dtypes and shapes, in hexadecimal.

    It does not depend on the order of the names nor on the device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class TensorCache:
    """Tensors under keys, in the part of a folder that belongs to one fingerprint.

    Attributes:
        folder: The folder, in which every fingerprint has a folder of its own.
        fingerprint: Stands for all that the tensors depend on, beside their key.
        report: A function that is told of an entry that cannot be used.
    """

    folder: Path
    fingerprint: str
    report: Callable[[str], None] = field(default=warn)

    @property
    def place(self) -> Path:
        """The folder of this fingerprint."""
        return self.folder / self.fingerprint[:16]

    @property
    def bytes(self) -> int:
        """The size of all entries of this fingerprint."""
        return sum(path.stat().st_size for path in self.place.glob(f"*{_SUFFIX}"))

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors under a key, or None if there are none that can be used."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            self.report(f"{path}: damaged ({error}); it is computed again")
            return None
        if about.get("fingerprint") != self.fingerprint or about.get("key") != key:
            self.report(f"{path}: written for another model or other data; it is computed again")
            return None
        if about.get("sha256") != digest_tensors(tensors):
            self.report(f"{path}: damaged (its digest is another); it is computed again")
            return None
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> int:
        """Store tensors under a key, and return the size of the file in bytes.

        Raises:
            OSError: The file cannot be written.
        """
        path = self._path(key)
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {"fingerprint": self.fingerprint, "key": key, "sha256": digest_tensors(kept)}
        with atomic_write(path) as unfinished:
            save_file(kept, unfinished, about)
        return path.stat().st_size

    def _path(self, key: str) -> Path:
        return self.place / f"{key}{_SUFFIX}"
