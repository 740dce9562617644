"""Where activations are kept: in memory or in a folder, up to a number of bytes.

What comes first stays, and what finds no room is computed again each time. Epochs visit every
example once, in a new order, so that any part of the examples is used as often as another, and
throwing out what was used least recently would throw out what comes next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from prm.tensor_cache import TensorCache

_NAME = "states"


class Store(Protocol):
    """Keeps tensors by key."""

    def get(self, key: str) -> Tensor | None:
        """Return the tensor of a key, on the CPU, or None if it is not kept."""
        ...

    def put(self, key: str, states: Tensor) -> None:
        """Keep a tensor, if there is room for it."""
        ...


@dataclass(eq=False)
class MemoryStore:
    """Tensors in memory.

    Attributes:
        limit: The most bytes that are kept.
        bytes: The bytes that are kept.
    """

    limit: int
    bytes: int = 0
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def get(self, key: str) -> Tensor | None:
        """Return the tensor of a key, on the CPU, or None if it is not kept."""
        return self._kept.get(key)

    def put(self, key: str, states: Tensor) -> None:
        """Keep a tensor, if there is room for it."""
        if key not in self._kept and self.bytes + states.nbytes <= self.limit:
            self._kept[key] = states.detach().cpu().clone()
            self.bytes += states.nbytes


@dataclass(eq=False)
class DiskStore:
    """Tensors in a folder, those of earlier runs with the same fingerprint included.

    Attributes:
        cache: The folder.
        limit: The most bytes that its entries take, as far as this process knows.
        bytes: The bytes that they take.
    """

    cache: TensorCache
    limit: int
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = self.cache.bytes

    def get(self, key: str) -> Tensor | None:
        """Return the tensor of a key, on the CPU, or None if it is not kept."""
        found = self.cache.get(key)
        return None if found is None else found[_NAME]

    def put(self, key: str, states: Tensor) -> None:
        """Keep a tensor, if there is room for it."""
        if self.bytes + states.nbytes <= self.limit:
            self.bytes += self.cache.put(key, {_NAME: states})
