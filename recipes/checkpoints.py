"""Checkpoints of a run: all that it needs to go on as if it had never been interrupted.

``checkpoints/step-<n>/`` holds, after n lower steps,

* ``state.safetensors``: the state of both levels (parameters, optimizers, what the hypergradient
  remembers, counts) and torch's random states;
* ``run.json``: n, what the run is (options, digests of model and data), and the figures of the
  steps since the last line of ``log.jsonl``.

Order of data, schedules and visits are functions of the step; there is nothing to store. A
checkpoint is complete or it is not there: it is written under a temporary name,
flushed to disk, and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bilevel import BilevelState, tree
from bilevel.random_state import RandomState
from recipes.identity import differences
from recipes.option_values import OptionError
from recipes.run_directory import write_text

_STATE, _RUN = "state.safetensors", "run.json"
_UNFINISHED = ".tmp"


@dataclass(frozen=True)
class Progress:
    """What of a run changes from step to step.

    Attributes:
        state: of both levels.
        random: torch's random states after the step.
        unlogged: figures of the steps since the last line of the log, in order.
    """

    state: BilevelState
    random: RandomState
    unlogged: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Checkpoints:
    """Where the checkpoints of a run are, when they are due, and which run it is.

    Attributes:
        directory: ``<run directory>/checkpoints``.
        every: lower steps between checkpoints; 0: none.
        keep: how many of the newest to keep; 0: all.
        identity: of the run (``recipes.identity``).
    """

    directory: Path
    every: int
    keep: int
    identity: Mapping[str, Any]

    def due(self, steps: int) -> bool:
        """Whether to save after ``steps`` lower steps."""
        return self.every > 0 and steps % self.every == 0

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint, then remove the oldest beyond ``keep``; returns its directory.

        Costs one copy of the state in memory.
        """
        steps = int(progress.state.lower_steps)
        path = self.directory / f"step-{steps}"
        for leftover in self.directory.glob(f"step-*{_UNFINISHED}"):
            shutil.rmtree(leftover)
        _remove([path])
        unfinished = path.with_name(path.name + _UNFINISHED)
        unfinished.mkdir(parents=True)
        save_file(_tensors(progress), unfinished / _STATE)
        content = {"step": steps, "identity": self.identity, "unlogged": progress.unlogged}
        write_text(unfinished / _RUN, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        _flush(unfinished / _STATE)
        _flush(unfinished)
        os.replace(unfinished, path)
        _flush(self.directory)
        if self.keep:
            _remove(self._complete()[: -self.keep])
        return path

    def newest(self, example: BilevelState) -> Progress:
        """What the newest complete checkpoint holds, on the devices of ``example``.

        Args:
            example: a state of this run, for the structure: ``solver.init(...)``.

        Raises:
            OptionError: there is none, it cannot be read, or it is of another run; the message
                lists what differs.
        """
        complete = self._complete()
        if not complete:
            raise OptionError(
                f"--resume: {self.directory} holds no complete checkpoint; "
                "start the run again, with --save-every above 0 if it may be interrupted"
            )
        path = complete[-1]
        try:
            run = json.loads((path / _RUN).read_text(encoding="utf-8"))
            tensors = load_file(path / _STATE)
        except (OSError, ValueError, SafetensorError) as error:
            raise OptionError(
                f"--resume: {path} cannot be read ({error}); remove it to go on from the "
                "checkpoint before it"
            ) from error
        different = differences(run["identity"], self.identity)
        if different:
            raise OptionError(
                f"--resume: {path} is of another run: {'; '.join(different)}. Give the run's own "
                "options and files, or start a new run in another directory"
            )
        try:
            state, random = _levels_and_random(tensors, example)
        except ValueError as error:
            raise OptionError(f"--resume: {path}: {error}") from error
        return Progress(state, random, run["unlogged"])

    def _complete(self) -> list[Path]:
        """Directories of complete checkpoints, oldest first."""
        found = {
            int(match[1]): path
            for path in self.directory.glob("step-*")
            if (match := re.fullmatch(r"step-(\d+)", path.name))
        }
        return [found[steps] for steps in sorted(found)]


def _tensors(progress: Progress) -> dict[str, Tensor]:
    random = {"cpu": progress.random.cpu} | {str(d): s for d, s in progress.random.devices}
    parts = {"state": tree.flatten(progress.state), "random": random}
    # Cloned: the file format refuses tensors that share memory.
    return {
        f"{part}/{name}": tensor.detach().cpu().contiguous().clone()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def _levels_and_random(
    tensors: Mapping[str, Tensor], example: BilevelState
) -> tuple[BilevelState, RandomState]:
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "random": {}}
    for path, tensor in tensors.items():
        part, _, name = path.partition("/")
        parts[part][name] = tensor
    # Copied into memory of torch's own alignment, on which sums may depend.
    state = tree.map(
        lambda like, tensor: torch.empty_like(like).copy_(tensor),
        example,
        tree.unflatten(parts["state"], example),
    )
    random = {name: tensor.clone() for name, tensor in parts["random"].items()}
    cpu = random.pop("cpu")
    return state, RandomState(cpu, tuple((torch.device(name), s) for name, s in random.items()))


def _flush(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(paths: Iterable[Path]) -> None:
    """Remove directories, each under a temporary name, so that no half of one looks complete."""
    for path in paths:
        if path.is_dir():
            doomed = path.with_name(path.name + _UNFINISHED)
            os.replace(path, doomed)
            shutil.rmtree(doomed)
