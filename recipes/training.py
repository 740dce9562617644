"""The training loop: batches in order, solver steps, log lines, progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from bilevel import BilevelSolver, BilevelState, StepInfo
from bilevel.random_state import capture, restore
from recipes.checkpoints import Checkpoints, Progress
from recipes.run_directory import append_log
from weighting import effective_sample_size

Batch = Mapping[str, Tensor]


class StepError(RuntimeError):
    """A step that cannot be taken; the message says which, why and what to try."""


class NonFiniteError(StepError):
    """A loss that is not a number."""


def train(
    solver: BilevelSolver,
    start: Progress,
    *,
    steps: int,
    lower_batches: Callable[[int], Sequence[Batch]],
    upper_batch: Callable[[int], Batch] | None,
    log: Path | None,
    log_every: int,
    title: str,
    progress: bool,
    learning_rates: Mapping[str, Callable[[int], float]],
    checkpoints: Checkpoints,
) -> BilevelState:
    """Take lower steps until there are ``steps``, and the upper steps of the solver between them.

    Args:
        solver: the algorithm.
        start: where the run stands; its count of lower steps says at which step.
        steps: lower-level optimizer steps of the whole run.
        lower_batches: micro-batches of a step.
        upper_batch: meta batch of a step; None: no upper level (plain training).
        log: ``log.jsonl``, or None.
        log_every: steps between log lines; every figure is the mean over them.
        title: what the progress bar says.
        progress: show the bar.
        learning_rates: name -> schedule, logged.
        checkpoints: where and when to save.

    Raises:
        NonFiniteError: the lower or upper loss of a step is not finite; the state before that step
            is lost to the caller, what was logged remains.
        StepError: the problem or the route refuses a batch (weights that cannot be normalised, no
            pair of candidates, a model without per-example rules), likewise.
    """
    state, first = start.state, int(start.state.lower_steps)
    window = {name: list(values) for name, values in start.unlogged.items()}
    restore(start.random)
    with tqdm(
        range(first, steps),
        desc=title,
        initial=first,
        total=steps,
        disable=not progress,
        dynamic_ncols=True,
    ) as bar:
        for step in bar:
            batches = lower_batches(step)
            wants_upper = upper_batch is not None and solver.wants_upper(state)
            meta = upper_batch(step) if upper_batch and wants_upper else None
            try:
                state, info = solver.step(state, batches, meta)
            except ValueError as error:
                raise StepError(f"{title}, step {step}: {error}") from error
            figures = _figures(info)
            for name in ("lower_loss", "upper_loss"):
                if not math.isfinite(figures.get(name, 0.0)):
                    raise NonFiniteError(
                        f"{title}, step {step}: {name} is {figures[name]}. Lower the learning rate "
                        "(--lower-lr, --upper-lr), or check the data of this step with the log"
                    )
            for name, value in figures.items():
                window.setdefault(name, []).append(value)
            if (step + 1) % log_every == 0 or step + 1 == steps:
                means = {name: sum(values) / len(values) for name, values in window.items()}
                window.clear()
                rates = {name: float(rate(step)) for name, rate in learning_rates.items()}
                if log is not None:
                    append_log(log, {"phase": title, "step": step + 1, **means, **rates})
                bar.set_postfix(_postfix(means))
            if checkpoints.due(step + 1):
                checkpoints.save(Progress(state, capture(state.lower_params), window))
    return state


def _figures(info: StepInfo) -> dict[str, float]:
    figures = {
        "lower_loss": float(info.lower_loss),
        "lower_grad_norm": float(info.lower_grad_norm),
    }
    if info.weights is not None:
        figures |= _weight_figures(info.weights)
    if info.upper_loss is not None:
        figures["upper_loss"] = float(info.upper_loss)
    if info.hypergradient_norm is not None:
        figures["hypergradient_norm"] = float(info.hypergradient_norm)
    return figures


def _weight_figures(weights: Tensor) -> dict[str, float]:
    return {
        "weights/mean": float(weights.mean()),
        "weights/min": float(weights.min()),
        "weights/max": float(weights.max()),
        "weights/ess": effective_sample_size(weights) / max(1, weights.numel()),
    }


def _postfix(means: Mapping[str, float]) -> dict[str, Any]:
    shown = {"lower": "lower_loss"}
    if "upper_loss" in means:
        shown |= {"upper": "upper_loss", "weight": "weights/mean", "ess": "weights/ess"}
    return {name: f"{means[key]:.3f}" for name, key in shown.items() if key in means}
