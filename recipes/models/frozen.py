"""``--frozen-activations``: what the frozen front of the model computed is kept between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

from torch import Tensor

from prm.activations.batches import FrozenFront
from prm.activations.fingerprint import front_fingerprint
from prm.activations.stores import DiskStore, MemoryStore, Store
from prm.models.boundary import find_boundary
from prm.models.model import PRM
from prm.tensor_cache import TensorCache
from recipes.models.loading import Examples
from recipes.options.train import LowerOptions
from recipes.options.values import OptionError
from recipes.terminal import say

Batches = TypeVar("Batches")
Numbered = Callable[[int], Batches]

CACHE = "cache"
"""Name of the folder in the run directory."""


def at_boundary(prm: PRM, lower: Mapping[str, Tensor], options: LowerOptions) -> PRM:
    """Return the model with the boundary of what is trained, if activations are to be kept.

    Passes over whole files, for scores and for the features of gradients, read them too: what is
    kept in memory, or in the folder of ``--cache-dir``. A model that is spread over processes
    computes its front in them.

    Raises:
        OptionError: A trained parameter comes before anything that could be kept.
    """
    if options.frozen.keep == "none":
        return prm
    boundary = find_boundary(prm.model, lower)
    if boundary is None:
        raise OptionError(
            f"--frozen-activations {options.frozen.keep}: no layer and no vision tower is frozen "
            f"in front of the trained parameters (the first is {next(iter(lower))}), so that there "
            "is nothing to keep; give --freeze a vision tower, or the embeddings with the first "
            "layers (and all that pictures go through), or leave this option out"
        )
    prm = replace(prm, boundary=boundary)
    folder = options.run.cache_dir
    if prm.spread is not None or (options.frozen.keep == "disk" and folder is None):
        return prm
    return replace(prm, front=FrozenFront(prm, _store(prm, options, Path(folder or CACHE))))


def cache_folder(options: LowerOptions, directory: Path) -> Path:
    """Return the folder of ``--cache-dir``, by default one in the run directory."""
    folder = options.run.cache_dir
    return directory / CACHE if folder is None else Path(folder)


@dataclass(frozen=True)
class Keeping:
    """Puts kept activations into the batches of a run.

    Attributes:
        prm: The model, with its boundary, or without one: then batches stay as they are.
        options: What is kept, where, and how much of it for each level.
        folder: The folder of what is kept on disk.
    """

    prm: PRM
    options: LowerOptions
    folder: Path

    def __call__(self, batches: Numbered[Batches]) -> Numbered[Batches]:
        """Return the numbered batches, or lists of micro-batches, of a level with activations.

        Each level that is given has the limit of ``--frozen-activations-limit`` to itself.
        """
        if self.prm.boundary is None:
            return batches
        front = FrozenFront(self.prm, _store(self.prm, self.options, self.folder))

        def filled(step: int) -> Batches:
            found = batches(step)
            if isinstance(found, dict):
                return cast(Batches, front(found))
            assert isinstance(found, list)
            return cast(Batches, [front(one) for one in found])

        return filled

    def check(self, sets: Sequence[Examples]) -> None:
        """Refuse a model or data for which nothing can be kept.

        Args:
            sets: The examples of the levels.

        Raises:
            OptionError: The model does not go on from the boundary with the same bits, or no
                example has a picture and the boundary is that of pictures.
        """
        boundary = self.prm.boundary
        if boundary is None:
            return
        option = f"--frozen-activations {self.options.frozen.keep}"
        data, row = sets[0], 0
        if boundary.place != "layers":
            pictured = [one for one in sets if next(iter(one.pictures), None) is not None]
            if not pictured:
                raise OptionError(
                    f"{option}: has no effect, since no example has a picture and {boundary} is "
                    "all that is frozen in front of the trained parameters; leave it out"
                )
            data = pictured[0]
            row = next(row for row, example in enumerate(data.examples) if example.images)
        try:
            FrozenFront(self.prm, MemoryStore(2**62)).check(data.batch([row]))
        except ValueError as error:
            raise OptionError(f"{option}: {error}; leave it out") from error


def _store(prm: PRM, options: LowerOptions, folder: Path) -> Store:
    limit = int(options.frozen.limit * 1e9)
    if options.frozen.keep == "memory":
        return MemoryStore(limit)
    return DiskStore(TensorCache(folder, front_fingerprint(prm), say), limit)
