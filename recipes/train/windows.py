"""Steps of a run in the portions that its hypergradient takes them: one, or a whole window."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from bilevel import BilevelSolver, BilevelState, StationarityWarning, StepInfo
from bilevel.hypergradients.base import spans_window
from recipes.run.errors import StepError

Batch = Mapping[str, Tensor]


def portion(solver: BilevelSolver, state: BilevelState, steps: int) -> int:
    """How many lower steps come next: a window where its steps belong together, else one.

    What is left of a run at its end and is shorter than a window is taken step by step, without an
    upper step.
    """
    length = solver.unroll_steps
    whole = spans_window(solver.hypergradient, length) and solver.starts_window(state)
    return length if whole and int(state.lower_steps) + length <= steps else 1


def make_batches(
    solver: BilevelSolver,
    state: BilevelState,
    count: int,
    lower_batches: Callable[[int], Sequence[Batch]],
    upper_batch: Callable[[int], Batch] | None,
    title: str,
) -> tuple[list[Sequence[Batch]], Batch | None]:
    """Micro-batches of the next ``count`` steps, and the meta batch if an upper step follows.

    Raises:
        StepError: one cannot be made: an image that is gone or cut short, a loader that died.
    """
    first = int(state.lower_steps)
    step = first
    try:
        lower = []
        for step in range(first, first + count):
            lower.append(lower_batches(step))
        spans = spans_window(solver.hypergradient, solver.unroll_steps)
        due = count > 1 if spans else solver.wants_upper(state)
        return lower, upper_batch(step) if upper_batch is not None and due else None
    except (OSError, ValueError, RuntimeError) as error:
        raise StepError(f"{title}, step {step}: a batch cannot be made: {error}") from error


def take(
    solver: BilevelSolver,
    state: BilevelState,
    lower: Sequence[Sequence[Batch]],
    upper: Batch | None,
    title: str,
) -> tuple[BilevelState, tuple[StepInfo, ...]]:
    """Take the steps of these batches.

    Raises:
        StepError: the problem or the route refuses a batch: weights that cannot be normalised, no
            pair of candidates, a model without per-example rules.
    """
    try:
        with warnings.catch_warnings():
            # It is among the notes of every step that it is true of, which are logged.
            warnings.simplefilter("ignore", StationarityWarning)
            if len(lower) > 1:
                return solver.window(state, lower, upper)
            state, info = solver.step(state, lower[0], upper)
            return state, (info,)
    except ValueError as error:
        raise StepError(f"{title}, step {int(state.lower_steps)}: {error}") from error
