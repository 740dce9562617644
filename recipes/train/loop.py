"""The training loop: batches in order, solver steps, troubles, log lines, checkpoints, signals."""

from __future__ import annotations

import signal as signals
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel import (
    BilevelSolver,
    BilevelState,
    Collective,
    RankError,
    ResidentSolver,
    StationarityWarning,
    StepInfo,
    tree,
)
from bilevel.autodiff.random_state import capture, restore
from bilevel.collective import ALONE
from bilevel.lower.guard import LOOKS, Guard, counts
from bilevel.profiling import part
from bilevel.resident.solver import is_consumed
from bilevel.solver import UNREAD
from recipes.profiling import profiled
from recipes.ranks import lost, own_random_numbers
from recipes.run.checkpoints import Progress
from recipes.run.errors import NonFiniteError, StepError, Stopped
from recipes.run.late import LateSteps, Settled, all_one, are_possible
from recipes.run.resume import Run
from recipes.run.step_log import Unlogged, append_line
from recipes.run.trouble import GIVE_UP, Trouble, find_troubles, read_steps
from recipes.stopping import stop_requests
from recipes.terminal import progress_bar
from recipes.train.dev_evaluation import DevEvaluation
from weighting import Weighting

OnTrouble: TypeAlias = Literal["raise", "skip", "rollback"]
Batch: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Training:
    """The solver, the data and the length of a training run.

    Attributes:
        solver: The bilevel solver.
        steps: The number of lower steps of the whole run.
        lower_batches: A function from a step to its micro-batches.
        upper_batch: A function from a step to the meta batch of the upper step after it. It is
            None without an upper level (plain training).
        weighting: The weighting whose bound is checked, None without one.
        title: The name of the run, for the progress bar, the log and errors.
        on_trouble: What follows when a step is rejected; see ``recipes.run.trouble``.
        dev: The evaluations during training, None without any.
    """

    solver: BilevelSolver[Any, Any, Batch]
    steps: int
    lower_batches: Callable[[int], Sequence[Batch]]
    title: str
    on_trouble: OnTrouble
    upper_batch: Callable[[int], Batch] | None = None
    weighting: Weighting | None = None
    dev: DevEvaluation | None = None


@dataclass(frozen=True)
class StepLogging:
    """How steps are shown and logged.

    Attributes:
        every: The number of steps between log lines. A line holds the means over them.
        learning_rates: The schedules to log, by name.
        progress_bar: Whether the progress bar is shown.
        on_line: Functions that are called after each line is in the log, with the step and the
            learned weights of its examples, None if none are learned or the step was rejected.
        profile: The number of steps that are profiled, after the first; see
            ``recipes.profiling``.
    """

    every: int
    learning_rates: Mapping[str, Callable[[int], float]] = field(default_factory=dict)
    progress_bar: bool = False
    on_line: Sequence[Callable[[int, Tensor | None], None]] = ()
    profile: int = 0


def train(run: Run, training: Training, logging: StepLogging) -> Progress:
    """Take the remaining lower steps of the run, and the upper steps of the solver between them.

    Whenever the run ends early, except by a kill, it saves the state after the last complete step.

    Args:
        run: The run: its directory, its checkpoints and the state to start from.
        training: The solver, the data and the length of the run.
        logging: How steps are shown and logged.

    Returns:
        The state of the run at the end.

    Raises:
        NonFiniteError: A step is rejected with ``on_trouble`` "raise", or too many in a row are.
        StepError: A batch cannot be prepared, or the problem or the route refuses it.
        WriteError: The log or a checkpoint cannot be written. Of a checkpoint that was written
            while training went on, this is seen when the next one is due, or at the end.
        Stopped: SIGINT or SIGTERM arrived. The current step was completed.
    """
    progress = run.start
    restore(progress.random)
    in_place = isinstance(training.solver, ResidentSolver)
    rolls_back = in_place and training.on_trouble == "rollback" and run.writes
    if rolls_back and run.checkpoints.newest() is None:
        run.checkpoints.save(progress)  # The state before the first step is not kept in memory.
    with run.keeping(progress):
        progress = evaluated(run, training, progress, None)
    began, first_step = time.monotonic(), int(progress.state.lower_steps)
    with (
        stop_requests() as requested,
        progress_bar(
            training.title,
            training.steps,
            int(progress.state.lower_steps),
            shown=logging.progress_bar,
        ) as bar,
        profiled(logging.profile, run.directory / "profile") as stepped,
    ):

        def settle(progress: Progress, late: LateSteps) -> Settled:
            def logged(progress: Progress, infos: Sequence[StepInfo]) -> Progress:
                return log_steps(run, training, logging, Judged(progress, infos, False), bar)

            return late.settled(progress, training.solver, training.weighting, logged)

        late: LateSteps | None = None
        reads_late = are_possible(training.solver, progress.state, run.ranks.ranks)
        looks_until, ones = int(progress.state.lower_steps) + 1, False
        while (first := _taken(progress, late)) < training.steps:
            signal = None
            try:
                if not reads_late or first < looks_until:
                    state, infos = next_steps(training, progress.state, run.ranks)
                    judged = judge(run, training, progress, state, infos)
                    progress = log_steps(run, training, logging, judged, bar)
                    ones = all_one(judged.infos)
                else:
                    late = late or LateSteps.after(progress.state, progress.seen, ones)
                    late = take_late(training, late)
                stepped()
                signal = _signal_of_any(run.ranks, requested())
                after = _taken(progress, late)
                is_due = _is_due(run, training, logging, first, after, progress)
                if late is not None and (signal or is_due):
                    unread, late = late, None
                    settled = settle(progress, unread)
                    progress, ones = settled.progress, settled.all_one
                    if settled.stuck:
                        raise _stuck(training, progress)
                    if not settled.usual:
                        looks_until = int(progress.state.lower_steps) + logging.every
                if late is None:
                    pace = (time.monotonic() - began) / max(after - first_step, 1)
                    progress = evaluated(run, training, progress, pace * (training.steps - after))
                if run.checkpoints.due(first, _taken(progress, late)):
                    run.save(progress, aside=after < training.steps)
            except Exception as error:
                if late is not None:
                    unread, late = late, None
                    settled = settle(progress, unread)
                    progress, ones = settled.progress, settled.all_one
                    if settled.stuck:
                        raise run.explained(_stuck(training, progress), progress) from error
                    if not settled.usual:  # The error may come from what was not usual.
                        looks_until = int(progress.state.lower_steps) + logging.every
                        continue
                if (signal := requested()) and _may_come_from_signal(error):
                    raise _stopped(run, training, progress, signal) from error
                raise run.explained(error, progress) from error
            if signal:
                raise _stopped(run, training, progress, signal)
    with run.keeping(progress):
        run.checkpoints.finish()
    return progress


def _taken(progress: Progress, late: LateSteps | None) -> int:
    """Return the number of lower steps that were launched."""
    return int((progress if late is None else late).state.lower_steps)


def _is_due(
    run: Run, training: Training, logging: StepLogging, first: int, after: int, progress: Progress
) -> bool:
    """Return whether the steps ``first`` + 1 to ``after`` are to be read.

    They are for a line of the log, a checkpoint, or an evaluation since ``progress``.
    """
    line = after // logging.every > first // logging.every or after >= training.steps
    looks = training.dev is not None and training.dev.due(after, progress.dev)
    return line or looks or run.checkpoints.due(first, after)


def evaluated(
    run: Run, training: Training, progress: Progress, seconds_left: float | None
) -> Progress:
    """Score the dev set if that is due, and return the run with its score."""
    steps = int(progress.state.lower_steps)
    if training.dev is None or not training.dev.due(steps, progress.dev):
        return progress
    return training.dev.taken(run, progress, seconds_left)


def take_late(training: Training, late: LateSteps) -> LateSteps:
    """Launch the next lower step, and the upper step if one is due after it, without looking.

    Raises:
        StepError: As ``next_steps``.
    """
    guard, before = late.guard(), counts(late.state)
    random = capture(late.state.lower_params)
    new, infos = next_steps(training, late.state, ALONE, guard)
    return late.with_step(
        new,
        infos,
        guard,
        (random, capture(new.lower_params)),
        training.weighting,
        before,
        in_place=isinstance(training.solver, ResidentSolver),
    )


def _stuck(training: Training, progress: Progress) -> NonFiniteError:
    """Return the error of a lower step in place after which the upper level is not finite."""
    return NonFiniteError(
        f"{training.title}, step {int(progress.state.lower_steps) - 1}: an upper parameter is not "
        "finite, and the lower step was taken in place. Lower --upper-lr, or use --execution "
        "functional"
    )


def _signal_of_any(ranks: Collective, own: signals.Signals | None) -> signals.Signals | None:
    """Return the signal that arrived at any rank, so that all stop after the same step."""
    if ranks.ranks == 1:
        return own
    number = max(ranks.numbers(own or 0))
    return signals.Signals(number) if number else None


def next_steps(
    training: Training,
    state: BilevelState[Any, Any],
    ranks: Collective = ALONE,
    guard: Guard = LOOKS,
) -> tuple[BilevelState[Any, Any], tuple[StepInfo, ...]]:
    """Take the next lower step, or window, and the upper step if one is due after it.

    If fewer steps than a window remain at the end of a run, they are taken one by one, without an
    upper step.

    Raises:
        StepError: A batch cannot be prepared, or the problem or the route refuses it: weights that
            cannot be normalised, no pair of candidates, a model without per-example rules; or
            another rank fails or is gone.
    """
    first = int(state.lower_steps)
    due = training.solver.next_steps(state, training.steps - first)
    reads = due.upper and training.solver.reads_upper_batch(state)
    lower, upper = _make_batches(training, range(first, first + due.lower), reads)
    if due.upper and not reads:
        upper = UNREAD
    try:
        with warnings.catch_warnings(), own_random_numbers(ranks, state.lower_params, first):
            # The warning is also among the notes of every step that it concerns, which are logged.
            warnings.simplefilter("ignore", StationarityWarning)
            if guard is LOOKS:
                state, infos = training.solver.advance(state, lower, upper)
            else:
                state, infos = training.solver.advance(state, lower, upper, guard=guard)
    except (ValueError, RankError) as error:
        raise StepError(f"{training.title}, step {first}: {error}") from error
    if ranks.ranks > 1:  # What the meta loss returns beside it is of the part of one rank.
        infos = tuple(info._replace(upper_aux=None) for info in infos)
    return state, infos


@part("data")
def _make_batches(
    training: Training, steps: range, upper_read: bool
) -> tuple[list[Sequence[Batch]], Batch | None]:
    """Return the micro-batches of each step, and the meta batch if an upper step reads it.

    Raises:
        StepError: An image is missing or truncated, or a worker process died.
    """
    step = steps.start
    try:
        lower = []
        for step in steps:
            lower.append(training.lower_batches(step))
        upper = training.upper_batch if upper_read else None
        return lower, None if upper is None else upper(step)
    except (OSError, ValueError, RuntimeError) as error:
        text = f"{training.title}, step {step}: a batch cannot be made: {error}"
        raise StepError(text) from error


@dataclass(frozen=True)
class Judged:
    """The run after its last steps were accepted or rejected, before they are logged.

    Attributes:
        progress: The state of the run.
        infos: The information of each lower step, read by the host.
        rejected: Whether the steps were rejected.
    """

    progress: Progress
    infos: Sequence[StepInfo]
    rejected: bool


@part("judge")
def judge(
    run: Run,
    training: Training,
    progress: Progress,
    state: BilevelState[Any, Any],
    infos: Sequence[StepInfo],
) -> Judged:
    """Accept the steps that led from ``progress`` to ``state``, or reject them.

    Raises:
        NonFiniteError: They are rejected with ``on_trouble`` "raise", or too many in a row were.
    """
    after = int(state.lower_steps)
    first = after - len(infos)  # The state before may have been consumed.
    # A resident solver has looked at loss and gradient before θ moved.
    in_place = isinstance(training.solver, ResidentSolver)
    reading = read_steps(state, infos, training.weighting, lower=not in_place)
    troubles = find_troubles(
        training.solver, training.weighting, progress.state, state, reading, progress.seen
    )
    seen = progress.seen.after(troubles, reading.infos)
    fatal = next((trouble for trouble in troubles if trouble.rejects), None)
    lost = () if fatal is None else range(first + 1, after + 1)
    unlogged = progress.unlogged.with_troubles(troubles, lost)
    if fatal is None:
        progress = replace(progress, state=state, random=capture(state.lower_params))
    else:
        _report(fatal, training, first, seen.in_a_row)
        progress = _without_steps(run, training, progress, state)
    progress = replace(progress, unlogged=unlogged, seen=seen)
    return Judged(progress, reading.infos, fatal is not None)


def log_steps(
    run: Run, training: Training, logging: StepLogging, judged: Judged, bar: tqdm[Any]
) -> Progress:
    """Write the log lines that are due after these steps, and move the progress bar.

    Raises:
        WriteError: The log cannot be written.
    """
    progress, unlogged = judged.progress, judged.progress.unlogged
    learned = training.weighting is not None
    last = int(progress.state.lower_steps)
    for step, info in enumerate(judged.infos, last + 1 - len(judged.infos)):
        unlogged = unlogged if judged.rejected else unlogged.after(info)
        bar.update()
        if step % logging.every == 0 or step == training.steps:
            bar.set_postfix(_postfix(unlogged.means()))
            schedules = logging.learning_rates.items()
            rates = {name: float(schedule(step - 1)) for name, schedule in schedules}
            skipped = int(progress.state.upper_skipped)
            if run.writes:
                append_line(run.log, unlogged.line(training.title, step, skipped, rates))
            unlogged = Unlogged({})
            for told in logging.on_line:
                told(step, info.weights if learned and not judged.rejected else None)
    return replace(progress, unlogged=unlogged)


def _stopped(run: Run, training: Training, progress: Progress, signal: signals.Signals) -> Stopped:
    """Save the state, and return the error that ends a run after a signal to stop."""
    after = f"after {int(progress.state.lower_steps)} of {training.steps} lower steps"
    text = (
        f"{training.title}: stopped by {signal.name} {after}; {run.keep(progress, together=True)}"
    )
    return Stopped(text, 128 + signal)


def _may_come_from_signal(error: Exception) -> bool:
    """Return whether the signal may have ended the worker processes, too.

    torch raises that error at any point of the main process. It does not come from there if another
    rank is gone, for which torchrun sends the others a signal.
    """
    if lost(error):
        return False
    return isinstance(error, StepError) or "DataLoader worker" in str(error)


def _report(trouble: Trouble, training: Training, step: int, in_a_row: int) -> None:
    """Print what is done about a rejected step.

    Raises:
        NonFiniteError: The run has to end.
    """
    where = f"{training.title}, step {step}: {trouble.text}. "
    remedy = (
        "Lower the learning rate (--lower-lr, --upper-lr), or check the data of this step with the "
        "log"
    )
    if training.on_trouble == "raise":
        raise NonFiniteError(f"{where}{remedy}; or go on without such steps: --on-trouble skip")
    if in_a_row >= GIVE_UP:
        raise NonFiniteError(f"{where}It is the {in_a_row}th such step in a row. {remedy}")
    tqdm.write(f"{where}{_CONSEQUENCES[training.on_trouble]}", file=sys.stderr)


_CONSEQUENCES = {"skip": "The step is not taken", "rollback": "Back to the last checkpoint"}


def _without_steps(
    run: Run, training: Training, progress: Progress, after: BilevelState[Any, Any]
) -> Progress:
    """Return both levels without the last steps; the data continue after these.

    With ``skip``, lower steps that were taken in place stay taken, and the upper step alone is left
    out.

    Raises:
        NonFiniteError: They stay taken, and a parameter is not finite.
    """
    steps = int(after.lower_steps)
    if training.on_trouble == "rollback":
        back = run.before_trouble()
    elif is_consumed(progress.state):
        if not tree.allfinite(after.lower_params):
            raise NonFiniteError(
                f"{training.title}, step {steps - 1}: a lower parameter is not finite, and a step "
                "in place cannot be left out afterwards: use --on-trouble rollback"
            )
        state = _without_upper_step(progress.state, after)
        return replace(progress, state=state, random=capture(state.lower_params))
    else:
        back = progress
    restore(back.random)
    state = back.state._replace(lower_steps=torch.full_like(after.lower_steps, steps))
    return replace(progress, state=state, random=back.random)


def _without_upper_step(
    before: BilevelState[Any, Any], after: BilevelState[Any, Any]
) -> BilevelState[Any, Any]:
    return after._replace(
        upper_params=before.upper_params,
        upper_optimizer=before.upper_optimizer,
        upper_steps=before.upper_steps,
    )


def _postfix(means: Mapping[str, float]) -> dict[str, Any]:
    shown = {"lower": "lower_loss"}
    if "hypergradient_norm" in means:
        shown |= {"upper": "upper_loss", "weight": "weights/mean", "ess": "weights/ess"}
    return {name: f"{means[key]:.3f}" for name, key in shown.items() if key in means}
