"""Numerical trouble: what counts as such, under which name, and what it costs the run.

Some kinds reject a step: a loss, gradient, hypergradient, weight or parameter that is not finite,
or a hypergradient 10,000 times the median of the last ones. ``--on-trouble`` decides what follows:

* ``raise``: the run ends with the state before the step saved;
* ``skip``: the step (with a hypergradient through several steps: the window) is not taken.
  Parameters, optimizers, memory and random states stay as they were, bit for bit; only the count of
  steps, and so the data, go on. A hypergradient that is not finite costs no more than its upper
  step;
* ``rollback``: both levels return to the newest checkpoint of ``--save-every``, or to the start if
  there is none yet; the data go on after the step. As PaLM's training did at spikes of its loss
  (Chowdhery et al. 2022, arXiv 2204.02311, §5.1).

The other kinds are counted and logged, and the run goes on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import BilevelSolver, BilevelState, OneStep, StepInfo, Unrolled, tree
from weighting import Weighting, effective_sample_size

_HISTORY, _ENOUGH = 20, 10  # hypergradient norms in the median, and how many it needs at least
_EXPLODED, _VANISHED = 1e4, 1e-6  # multiples of that median
_AT_BOUND = 0.01  # share of the bound's width that counts as its end
_COLLAPSED = 0.1  # effective share of the batch, but no less than 1.5 examples
GIVE_UP = 10
"""Rejected steps in a row that end a run."""

# Where the upper step was left out, these do not reject the lower step.
_UPPER_KINDS = ("upper_loss_not_finite", "hypergradient_not_finite")


@dataclass(frozen=True)
class Trouble:
    """One thing that is wrong with a step.

    Attributes:
        kind: Name under which it is counted.
        text: Sentence that describes it, with the figures.
        rejects: Whether the step is rejected because of it.
    """

    kind: str
    text: str
    rejects: bool = True


@dataclass(frozen=True)
class Seen:
    """The troubles so far, and what the next step is compared with; fields that JSON can hold.

    Attributes:
        counts: Number of troubles by kind, over the whole run.
        norms: The last hypergradient norms, without those of rejected steps.
        in_a_row: Rejected steps (or windows) since the last accepted one.
    """

    counts: Mapping[str, int]
    norms: Sequence[float] = field(default_factory=list)
    in_a_row: int = 0

    def after(self, troubles: Sequence[Trouble], infos: Sequence[StepInfo]) -> Seen:
        """The record after one more step or window."""
        counts = added(self.counts, troubles)
        if any(trouble.rejects for trouble in troubles):
            return Seen(counts, self.norms, self.in_a_row + 1)
        norms = [float(i.hypergradient_norm) for i in infos if i.hypergradient_norm is not None]
        return Seen(counts, [*self.norms, *norms][-_HISTORY:])


def added(counts: Mapping[str, int], troubles: Sequence[Trouble]) -> dict[str, int]:
    """Counts by kind, ``troubles`` included."""
    total = dict(counts)
    for trouble in troubles:
        total[trouble.kind] = total.get(trouble.kind, 0) + 1
    return total


def find_troubles(
    solver: BilevelSolver[Any, Any, Any],
    weighting: Weighting | None,
    before: BilevelState[Any, Any],
    after: BilevelState[Any, Any],
    infos: Sequence[StepInfo],
    seen: Seen,
) -> list[Trouble]:
    """What is wrong with a step or window; of what is not finite, the first cause.

    Reads every parameter of both levels once.

    Args:
        solver: The solver that took the steps.
        weighting: The weighting of the run, whose weights may all be at its bound; None: no
            weighting.
        before: The state before the steps.
        after: The state after them.
        infos: One for each lower step.
        seen: The troubles and hypergradient norms before these steps.
    """
    troubles = [trouble for info in infos for trouble in _not_finite(info)]
    for level, params in (("lower", after.lower_params), ("upper", after.upper_params)):
        if not troubles and not tree.allfinite(params):
            troubles.append(Trouble("parameters_not_finite", f"a {level} parameter is not finite"))
    if after.upper_skipped > before.upper_skipped:  # the core left the upper level as it was
        only_upper = all(trouble.kind in _UPPER_KINDS for trouble in troubles)
        troubles = [replace(trouble, rejects=not only_upper) for trouble in troubles]
    norm = infos[-1].hypergradient_norm
    if troubles or norm is None:
        return troubles[:1]  # the others follow from it
    troubles = _of_size(float(norm), seen.norms)
    if _is_cold(solver, int(before.lower_steps), len(infos)):
        text = "the first step of Adam hardly depends on the weights; set --upper-start"
        troubles.append(Trouble("cold_optimizer", text, rejects=False))
    weights = infos[-1].weights
    if weights is not None:
        troubles += _of_weights(weighting, after.upper_params, weights)
    return troubles


def _not_finite(info: StepInfo) -> list[Trouble]:
    """Figures of a step that are not finite, in the order in which one leads to the next."""
    scalars = {
        "lower_loss": info.lower_loss,
        "lower_gradient": info.lower_grad_norm,
        "upper_loss": info.upper_loss,
        "hypergradient": info.hypergradient_norm,
    }
    troubles = [
        Trouble(f"{name}_not_finite", f"{name} is {float(value)}")
        for name, value in scalars.items()
        if value is not None and not math.isfinite(float(value))
    ]
    if not _finite(info.weights) and _finite(info.losses):  # else the model gave them
        troubles.insert(0, Trouble("weights_not_finite", "a weight is not finite"))
    return troubles


def _finite(values: Tensor | None) -> bool:
    return values is None or bool(torch.isfinite(values).all())


def _of_size(norm: float, before: Sequence[float]) -> list[Trouble]:
    """A hypergradient that is far from the median of those before it, or zero."""
    median = statistics.median(before) if len(before) >= _ENOUGH else None
    compared = f"hypergradient_norm is {norm:.3g}"
    if median is not None:
        compared += f", the median of the last {len(before)} is {median:.3g}"
    if median is not None and norm > _EXPLODED * median > 0:
        return [Trouble("hypergradient_exploded", compared)]
    if norm == 0 or (median is not None and norm < _VANISHED * median):
        return [Trouble("hypergradient_vanished", compared, rejects=False)]
    return []


def _is_cold(solver: BilevelSolver[Any, Any, Any], lower_steps: int, taken: int) -> bool:
    """Whether the hypergradient went through nothing but the first step of the lower optimizer."""
    method = solver.hypergradient
    through = (isinstance(method, OneStep) and method.order == "lower-first") or isinstance(
        method, Unrolled
    )
    return through and lower_steps == 0 and taken == 1


def _of_weights(
    weighting: Weighting | None, upper: Mapping[str, Tensor], weights: Tensor
) -> list[Trouble]:
    """All weights at an end of the bound; few examples that hold all of the weight."""
    troubles = []
    if weighting is not None and weighting.share_at_bound(upper, weights, _AT_BOUND) == 1.0:
        text = f"all weights are at an end of {weighting.bound}; lower --upper-lr"
        troubles.append(Trouble("weights_at_bound", text, rejects=False))
    size, count = effective_sample_size(weights), weights.numel()
    if count > 1 and size < max(1.5, _COLLAPSED * count):
        text = f"{count} examples count as {size:.2g}"
        troubles.append(Trouble("effective_sample_size_collapsed", text, rejects=False))
    return troubles
