"""Steps that a device judges itself, and that the host reads together, a line of the log at a time.

To look at a step is to wait for the device. So a step is launched without looking at those before
it (``bilevel.lower.guard``): what it changes counts only if all was usual, which is that no step
would have been rejected and none would have left anything out. The host reads all such steps at
once. From the first that was not usual on nothing has moved, and the run goes on there, looking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import BilevelSolver, BilevelState, Dot, OneStep, ResidentSolver, StepInfo, tree
from bilevel.autodiff.random_state import RandomState, restore
from bilevel.lower.guard import Late, counts, kept, with_counts
from bilevel.resident.solver import is_consumed
from bilevel.solver import ZERO
from recipes.run.checkpoints import Progress
from recipes.run.trouble import (
    Seen,
    as_read,
    find_troubles,
    largest_norm,
    last_norms,
    to_read,
)
from weighting import Weighting


class Unread(NamedTuple):
    """A step or window that was launched, as far as the host has to remember it.

    Attributes:
        before: The counts of the state before it.
        after: Those after it.
        random: The random states before it and after it.
        infos: The information of its lower steps, on the device.
        figures: What is to be read of it, by name, on the device.
    """

    before: list[Tensor]
    after: list[Tensor]
    random: tuple[RandomState, RandomState]
    infos: tuple[StepInfo, ...]
    figures: Mapping[str, Tensor]


class Settled(NamedTuple):
    """What the host knows after it has read late steps.

    Attributes:
        progress: The run after the last usual one.
        all_one: Whether all weights were exactly 1 in the usual ones.
        usual: Whether all were usual.
        stuck: Whether the lower level moved in place in the step after these, whose upper step led
            to a parameter that is not finite and was left out.
    """

    progress: Progress
    all_one: bool
    usual: bool
    stuck: bool = False


@dataclass(frozen=True)
class LateSteps:
    """The steps since the host last looked.

    Attributes:
        state: The state after them.
        usual: Whether all was usual in them, on the device.
        norms: The last hypergradient norms, float64, on the device.
        all_one: Whether it is usual that all weights are exactly 1.
        unread: The steps.
    """

    state: BilevelState[Any, Any]
    usual: Tensor
    norms: Tensor
    all_one: bool
    unread: tuple[Unread, ...] = ()

    @classmethod
    def after(cls, state: BilevelState[Any, Any], seen: Seen, all_one: bool) -> LateSteps:
        """Return no steps after a state that the host knows."""
        device = tree.leaves(state.lower_params)[0].device
        norms = torch.tensor(list(seen.norms), dtype=torch.float64).to(device)
        return cls(state, torch.ones((), dtype=torch.bool, device=device), norms, all_one)

    def guard(self) -> Late:
        """Return the guard of the next step."""
        return Late(self.usual, largest_norm(self.norms), self.all_one)

    def with_step(
        self,
        new: BilevelState[Any, Any],
        infos: tuple[StepInfo, ...],
        guard: Late,
        random: tuple[RandomState, RandomState],
        weighting: Weighting | None,
        before: list[Tensor],
        *,
        in_place: bool,
    ) -> LateSteps:
        """Return the steps with one more.

        Args:
            new: What the solver returned; its tensors are overwritten.
            infos: Likewise.
            guard: The guard that it was given.
            random: The random states before the step and after it.
            weighting: The weighting of the run.
            before: The counts of the state before the step.
            in_place: Whether the lower level moved in place, under the guard.
        """
        figures = dict(to_read(new, infos, weighting, lower=not in_place))
        figures["moved"] = guard.usual
        for level in ("lower", "upper"):
            if level in figures:
                guard.holds(figures[level])
        figures["usual"] = guard.usual
        after = counts(new)
        state = kept(guard.usual, new, self.state)
        norms = self.norms
        if (norm := infos[-1].hypergradient_norm) is not None:
            norms = last_norms(torch.cat([norms, norm.detach().to(norms)[None]]))
        unread = (*self.unread, Unread(before, after, random, infos, figures))
        return replace(self, state=state, usual=guard.usual, norms=norms, unread=unread)

    def settled(
        self,
        progress: Progress,
        solver: BilevelSolver[Any, Any, Any],
        weighting: Weighting | None,
        logged: Callable[[Progress, Sequence[StepInfo]], Progress],
    ) -> Settled:
        """Read and judge the steps, for which the host waits once.

        The random states are those of the run that is returned.

        Args:
            progress: The run before the steps.
            solver: The solver that took them.
            weighting: The weighting of the run, or None without one.
            logged: Logs accepted steps, given the run after them.
        """
        values = tree.on_host(
            {
                f"{number}/{name}": figure
                for number, step in enumerate(self.unread)
                for name, figure in step.figures.items()
            }
        )
        ones = True
        for number, step in enumerate(self.unread):
            found = {name: values[f"{number}/{name}"] for name in step.figures}
            before, after = (with_counts(self.state, one) for one in (step.before, step.after))
            if not found["usual"]:
                stuck = bool(found["moved"]) and isinstance(solver, ResidentSolver)
                state, random = before, step.random[stuck]
                if stuck:  # θ has moved, in place
                    state = before._replace(
                        lower_optimizer=after.lower_optimizer, lower_steps=after.lower_steps
                    )
                restore(random)
                progress = replace(progress, state=state, random=random)
                return Settled(progress, ones, False, stuck)
            reading = as_read(found, step.infos)
            infos = tuple(map(_with_note, reading.infos))
            reading = reading._replace(infos=infos)
            troubles = find_troubles(solver, weighting, before, after, reading, progress.seen)
            progress = replace(
                progress,
                state=after,
                random=step.random[1],
                unlogged=progress.unlogged.with_troubles(troubles, ()),
                seen=progress.seen.after(troubles, infos),
            )
            progress = logged(progress, infos)
            ones = ones and all_one(infos)
        if is_consumed(self.state):  # by a step that failed after it had moved θ in place
            consumed = progress.state._replace(lower_steps=self.state.lower_steps)
            progress = replace(progress, state=consumed)
        return Settled(progress, ones, True)


def _with_note(info: StepInfo) -> StepInfo:
    """Return the information with the note that needs the value of the hypergradient."""
    norm = info.hypergradient_norm
    if norm is None or norm != 0.0 or ZERO in info.notes:
        return info
    return info._replace(notes=(*info.notes, ZERO))


def are_possible(
    solver: BilevelSolver[Any, Any, Any], state: BilevelState[Any, Any], ranks: int
) -> bool:
    """Return whether steps of a solver may be read late, and whether there is any use in it.

    They may where one lower step is differentiated. In place that step has to be known to be usual
    before θ moves, which it is in order upper-first without an average of v.
    """
    (device, *_) = {leaf.device for leaf in tree.leaves(state.lower_params)}
    method = solver.hypergradient
    if device.type in ("cpu", "mps") or ranks > 1 or not isinstance(method, OneStep):
        return False
    if method.upper_gradient_every > 1:  # Whether v is computed is known to the host alone.
        return False
    if not isinstance(solver, ResidentSolver):
        return True
    # A single example's step takes a fiftieth of the kernels where the host knows its weight.
    single = method.route == Dot() and solver.accumulation == 1
    return method.order == "upper-first" and not method.direction_decay and not single


def all_one(infos: Sequence[StepInfo]) -> bool:
    """Return whether all weights of steps that were read are exactly 1."""
    weights = [info.weights for info in infos if info.weights is not None]
    return bool(weights) and all(bool((one == 1.0).all()) for one in weights)
