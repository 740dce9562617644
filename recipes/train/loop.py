"""The training loop: batches in order, solver steps, troubles, log lines, checkpoints, signals."""

from __future__ import annotations

import signal as signals
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from tqdm import tqdm

from bilevel import BilevelSolver
from bilevel.autodiff.random_state import capture, restore
from recipes.run.checkpoints import Progress
from recipes.run.errors import NonFiniteError, StepError, Stopped
from recipes.run.resume import Run
from recipes.run.step_log import Unlogged, append_line
from recipes.run.stopping import stop_requests
from recipes.run.trouble import GIVE_UP, Trouble, find_troubles
from recipes.train.windows import Batch, make_batches, portion, take
from weighting import Weighting

OnTrouble: TypeAlias = Literal["raise", "skip", "rollback"]


def train(
    solver: BilevelSolver,
    run: Run,
    *,
    steps: int,
    lower_batches: Callable[[int], Sequence[Batch]],
    upper_batch: Callable[[int], Batch] | None,
    weighting: Weighting | None,
    log_every: int,
    title: str,
    progress: bool,
    learning_rates: Mapping[str, Callable[[int], float]],
    on_trouble: OnTrouble,
    logged: Callable[[int], None] | None = None,
) -> Progress:
    """Take lower steps until there are ``steps``, and the upper steps of the solver between them.

    Whatever ends the run early (but a kill) saves the state after the last complete step.

    Args:
        solver: the algorithm.
        run: its directory, checkpoints, and where it stands.
        steps: lower-level optimizer steps of the whole run.
        lower_batches: micro-batches of a step.
        upper_batch: meta batch of a step; None: no upper level (plain training).
        weighting: whose bound is watched; None: there is none.
        log_every: steps between log lines; every figure is the mean over them.
        title: what the progress bar says.
        progress: show the bar.
        learning_rates: name -> schedule, logged.
        on_trouble: what a worthless step leads to, see ``recipes.run.trouble``.
        logged: called with the step after every line of the log, which is in the file by then.

    Returns:
        Where the run stands at the end.

    Raises:
        NonFiniteError: a worthless step, with ``on_trouble`` "raise", or too many in a row.
        StepError: a batch cannot be made, or the problem or the route refuses it.
        WriteError: the log or a checkpoint cannot be written.
        Stopped: SIGINT or SIGTERM came; the step under way was completed.
    """
    now = run.start
    restore(now.random)
    with (
        stop_requests() as asked,
        tqdm(
            desc=title,
            initial=int(now.state.lower_steps),
            total=steps,
            disable=not progress,
            dynamic_ncols=True,
        ) as bar,
    ):

        def go_on(now: Progress) -> Progress:
            """Take the next step or window, and log it."""
            first = int(now.state.lower_steps)
            count = portion(solver, now.state, steps)
            batches = make_batches(solver, now.state, count, lower_batches, upper_batch, title)
            state, infos = take(solver, now.state, *batches, title)
            found = find_troubles(solver, weighting, now.state, state, infos, now.seen)
            seen = now.seen.after(found, infos)
            worthless = next((trouble for trouble in found if trouble.rejects), None)
            taken = range(first + 1, first + count + 1)
            unlogged = now.unlogged.with_troubles(found, taken if worthless else ())
            if worthless is None:
                now = replace(now, state=state, random=capture(state.lower_params))
            else:
                _tell(worthless, title, first, on_trouble, seen.in_a_row)
                now = _untaken(run, now, first + count, on_trouble)
            for step, info in zip(taken, infos, strict=True):
                unlogged = unlogged if worthless else unlogged.after(info)
                bar.update()
                if step % log_every == 0 or step == steps:
                    bar.set_postfix(_postfix(unlogged.means()))
                    rates = {name: float(rate(step - 1)) for name, rate in learning_rates.items()}
                    skipped = int(now.state.upper_skipped)
                    append_line(run.log, unlogged.line(title, step, skipped, rates))
                    unlogged = Unlogged({})
                    if logged is not None:
                        logged(step)
            return replace(now, unlogged=unlogged, seen=seen)

        def stop(now: Progress, signal: signals.Signals) -> Stopped:
            after = f"after {int(now.state.lower_steps)} of {steps} lower steps"
            text = f"{title}: stopped by {signal.name} {after}; {run.keep(now)}"
            return Stopped(text, 128 + signal)

        while (first := int(now.state.lower_steps)) < steps:
            try:
                now = go_on(now)
                if run.checkpoints.due(first, int(now.state.lower_steps)):
                    run.checkpoints.save(now)
            except Exception as error:
                if (signal := asked()) and _of_loaders(error):
                    raise stop(now, signal) from error
                raise run.explained(error, now) from error
            if signal := asked():
                raise stop(now, signal)
    return now


def _of_loaders(error: Exception) -> bool:
    """Whether the signal may have reached the processes that make batches, too, and ended them.

    torch raises that in the middle of whatever this process does.
    """
    return isinstance(error, StepError) or "DataLoader worker" in str(error)


def _tell(trouble: Trouble, title: str, step: int, on_trouble: OnTrouble, in_a_row: int) -> None:
    """Say on the terminal what is done about a worthless step.

    Raises:
        NonFiniteError: nothing can be done.
    """
    where = f"{title}, step {step}: {trouble.text}. "
    remedy = (
        "Lower the learning rate (--lower-lr, --upper-lr), or check the data of this step with the "
        "log"
    )
    if on_trouble == "raise":
        raise NonFiniteError(f"{where}{remedy}; or go on without such steps: --on-trouble skip")
    if in_a_row >= GIVE_UP:
        raise NonFiniteError(f"{where}It is the {in_a_row}th such step in a row. {remedy}")
    tqdm.write(f"{where}{_DONE[on_trouble]}", file=sys.stderr)


_DONE = {"skip": "The step is not taken", "rollback": "Back to the last checkpoint"}


def _untaken(run: Run, now: Progress, after: int, on_trouble: OnTrouble) -> Progress:
    """Both levels as if the last steps had not been taken, and the data where they are."""
    back = run.before_trouble() if on_trouble == "rollback" else now
    restore(back.random)
    state = back.state._replace(lower_steps=torch.full_like(now.state.lower_steps, after))
    return replace(now, state=state, random=back.random)


def _postfix(means: Mapping[str, float]) -> dict[str, Any]:
    shown = {"lower": "lower_loss"}
    if "upper_loss" in means:
        shown |= {"upper": "upper_loss", "weight": "weights/mean", "ess": "weights/ess"}
    return {name: f"{means[key]:.3f}" for name, key in shown.items() if key in means}
