"""The loop around a solver: it draws batches, takes steps, and tells callbacks of each.

A callback is any function of a ``FitStep``; one that returns True ends the loop. This module has
those for progress, logs, checkpoints and early stopping. The loop is short on purpose: write your
own where you need more.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TextIO, TypeAlias

import torch

from bilevel import tree
from bilevel.collective import ALONE, Collective
from bilevel.inputs import check_source
from bilevel.problem import BatchT, Lower, Upper
from bilevel.solver import UNREAD, BilevelSolver
from bilevel.state import BilevelState, StepInfo
from bilevel.tree import TreeT


@dataclass(frozen=True)
class FitStep(Generic[Lower, Upper]):
    """What a callback is told: after a lower step, or a window where these belong together.

    Attributes:
        state: The state after it.
        infos: What is known of each lower step; the last has the fields of the upper step, if one
            was taken.
        steps: The lower steps at which the loop ends.
        collective: The ranks of the solver.
    """

    state: BilevelState[Lower, Upper]
    infos: tuple[StepInfo, ...]
    steps: int
    collective: Collective = ALONE


Callback: TypeAlias = Callable[[FitStep[Any, Any]], bool | None]


def fit(
    solver: BilevelSolver[Lower, Upper, BatchT],
    state: BilevelState[Lower, Upper],
    lower_batches: Iterable[BatchT],
    upper_batches: Iterable[BatchT],
    *,
    steps: int,
    callbacks: Sequence[Callback] = (),
) -> BilevelState[Lower, Upper]:
    """Take lower steps, and the upper steps of the solver between them, until there are ``steps``.

    ::

        loader = DataLoader(rows, batch_size=32, shuffle=True)
        state = fit(solver, solver.init(params, phi), loader, clean, steps=1000,
                    callbacks=[progress(), checkpoint("state.pt", every=100)])

    Args:
        solver: Takes the steps.
        state: From ``solver.init``, the last call or ``load_checkpoint``; not changed.
        lower_batches: Micro-batches, ``accumulation`` of them per lower step. A ``DataLoader`` or
            list is gone through again when it ends; an iterator that ends is an error.
        upper_batches: Batches of the upper loss, likewise. One is drawn for each upper step that
            looks at it (``OneStep(upper_gradient_every=…)``).
        steps: Lower steps in all, those that the state already has included.
        callbacks: Called in this order after each step. All of them are called before the loop
            ends for one of them.

    Raises:
        TypeError: ``steps`` is no whole number, or ``callbacks`` no list of functions.
        ValueError: There are no batches, or an iterator ended before the last step.
    """
    _require_count("fit", "steps", steps)
    if not isinstance(callbacks, Sequence) or not all(callable(one) for one in callbacks):
        raise TypeError(f"fit: callbacks must be a list of functions of a step, got {callbacks!r}")
    check_source("lower_batches", lower_batches)
    check_source("upper_batches", upper_batches)
    lower, upper = (
        _endless(batches, name)
        for name, batches in (("lower_batches", lower_batches), ("upper_batches", upper_batches))
    )
    while (taken := int(state.lower_steps)) < steps:
        due = solver.next_steps(state, steps - taken)
        batches = [[next(lower) for _ in range(solver.accumulation)] for _ in range(due.lower)]
        upper_batch: Any = None
        if due.upper:
            upper_batch = next(upper) if solver.reads_upper_batch(state) else UNREAD
        state, infos = solver.advance(state, batches, upper_batch)
        step = FitStep(state, infos, steps, solver.collective)
        ends = [callback(step) for callback in callbacks]
        if any(ends):
            break
    return state


def progress(stream: TextIO | None = None, *, seconds: float = 0.5) -> Callback:
    """Return a callback that shows steps and losses in one line of a terminal.

    Args:
        stream: Where; None: standard error. Nothing is written where it is not a terminal.
        seconds: The least time between two updates; the last step is always shown.
    """
    shown = -math.inf

    def show(step: FitStep[Any, Any]) -> None:
        nonlocal shown
        out = sys.stderr if stream is None else stream
        taken, now = int(step.state.lower_steps), time.monotonic()
        if not out.isatty() or (now - shown < seconds and taken < step.steps):
            return
        shown = now
        figures = " ".join(f"{name} {value:.4g}" for name, value in losses(step).items())
        out.write(f"\r{taken}/{step.steps} {figures}\x1b[K" + "\n" * (taken >= step.steps))
        out.flush()

    return show


def log(write: Callable[[Mapping[str, float]], object], *, every: int = 1) -> Callback:
    """Return a callback that writes step, losses and figures of every n-th lower step.

    Args:
        write: Takes ``{"step": …, "lower_loss": …, "upper_loss": …, …}``; the upper loss is missing
            where there was no upper step.
        every: n.
    """
    _require_count("log", "every", every)

    def written(step: FitStep[Any, Any]) -> None:
        if _passed(step, every):
            figures = {name: float(value) for name, value in step.infos[-1].figures.items()}
            write({"step": int(step.state.lower_steps), **losses(step), **figures})

    return written


def checkpoint(path: str | os.PathLike[str], *, every: int) -> Callback:
    """Return a callback that saves the state and torch's random state every n lower steps.

    The file is replaced as a whole, and holds named tensors alone; ``load_checkpoint`` reads it.

    Args:
        path: The file.
        every: n; the last step is always saved.

    Raises:
        ValueError: At the first step, if θ lies in shards: one file would be of one rank.
    """
    _require_count("checkpoint", "every", every)

    def save(step: FitStep[Any, Any]) -> None:
        if step.collective.in_place:
            raise ValueError(
                "checkpoint: θ lies in shards on several ranks, and this file would hold those "
                "of one; call bilevel.save_shards(folder, f, step.state) in a callback instead"
            )
        if _passed(step, every) or int(step.state.lower_steps) >= step.steps:
            _replace(Path(path), tree.flatten(step.state) | {_RANDOM: torch.get_rng_state()})

    return save


def load_checkpoint(path: str | os.PathLike[str], example: TreeT) -> TreeT:
    """Return a saved state, and set torch's random state (of the CPU) to the saved one.

    The place in the data is the caller's: pass ``fit`` the batches that are left. A ``DataLoader``
    draws a seed from torch's generator each time that it is gone through.

    Args:
        path: The file that ``checkpoint`` wrote.
        example: A state of the same structure: ``solver.init(...)``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no complete one of ``checkpoint``, or of another problem or
            optimizer.
    """
    try:
        named = torch.load(path, weights_only=True)
        random = named.pop(_RANDOM)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch has many, and its words are of its own format
        raise ValueError(
            f"{os.fspath(path)}: expected a whole file of bilevel.fit.checkpoint, found none "
            f"({type(error).__name__}); it was cut, or written by something else"
        ) from error
    state = tree.unflatten(named, example)
    torch.set_rng_state(random)
    return state


def early_stop(
    metric: Callable[[FitStep[Any, Any]], float | None], *, patience: int, least: float = 0.0
) -> Callback:
    """Return a callback that ends the loop when a figure has stopped falling.

    Args:
        metric: The figure, lower being better; None: not known after this step. A NaN is no
            improvement. ``lambda step: losses(step).get("upper_loss")``, say.
        patience: How many times in a row it may fail to fall.
        least: By how much it must fall to count.
    """
    _require_count("early_stop", "patience", patience)
    best, since = math.inf, 0

    def stop(step: FitStep[Any, Any]) -> bool:
        nonlocal best, since
        value = metric(step)
        if value is None:
            return False
        improved = value < best - least
        best, since = (value, 0) if improved else (best, since + 1)
        return since >= patience

    return stop


def losses(step: FitStep[Any, Any]) -> dict[str, float]:
    """Return the mean lower loss of the steps and, if there was an upper step, the upper loss."""
    lower = sum(float(info.lower_loss) for info in step.infos) / len(step.infos)
    upper = step.infos[-1].upper_loss
    return {"lower_loss": lower} | ({} if upper is None else {"upper_loss": float(upper)})


_RANDOM = "random_state"


def _endless(batches: Iterable[BatchT], name: str) -> Iterator[BatchT]:
    drawn = 0
    while True:
        before = drawn
        for batch in batches:
            drawn += 1
            yield batch
        if drawn == before:
            again = "ended after" if drawn else "has"
            raise ValueError(
                f"fit: {name} {again} {drawn} batches, and the loop needs more: pass a DataLoader "
                "or a list, which is gone through again, or an iterator that is long enough"
            )


def _passed(step: FitStep[Any, Any], every: int) -> bool:
    """Return whether a multiple of ``every`` lies among the lower steps just taken."""
    taken = int(step.state.lower_steps)
    return taken // every > (taken - len(step.infos)) // every


def _replace(path: Path, named: Mapping[str, torch.Tensor]) -> None:
    # A name that nobody else has, and the permissions that any new file of the user has.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            torch.save(dict(named), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _require_count(owner: str, field: str, value: int) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{owner}: {field} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{owner}: {field} must be at least 1, got {value}")
