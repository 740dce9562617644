"""Numerical trouble: what counts as such, under which name, and what it costs the run.

Some kinds make a step worthless: a loss, gradient, hypergradient, weight or parameter that is not
finite, or a hypergradient beyond all measure. ``--on-trouble`` says what follows:

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

import torch
from torch import Tensor

from bilevel import BilevelSolver, BilevelState, OneStep, StepInfo, Unrolled, tree
from weighting import Weighting, effective_sample_size

_HISTORY, _ENOUGH = 20, 10  # hypergradients whose median is the measure, and how many it takes
_EXPLODED, _VANISHED = 1e4, 1e-6  # times that median
_AT_BOUND = 0.01  # of the width of the bound counts as at its end
_COLLAPSED = 0.1  # of the batch, but no less than 1.5 examples
GIVE_UP = 10

# Of a step that is worthless; the others only make the hypergradient so.
_UPPER_KINDS = ("upper_loss_not_finite", "hypergradient_not_finite")


@dataclass(frozen=True)
class Trouble:
    """One thing that is wrong with a step: its name, the sentence for it, whether it is worthless.

    Attributes:
        kind: the name, as counted.
        text: what was found.
        worthless: whether the step is.
    """

    kind: str
    text: str
    worthless: bool = True


@dataclass(frozen=True)
class Seen:
    """What has been found so far, and what the next step is compared with; JSON.

    Attributes:
        counts: troubles by kind, over the whole run.
        norms: the last hypergradient norms, those of worthless steps left out.
        in_a_row: worthless steps (or windows) without a good one since.
    """

    counts: Mapping[str, int]
    norms: Sequence[float] = field(default_factory=list)
    in_a_row: int = 0

    def after(self, troubles: Sequence[Trouble], infos: Sequence[StepInfo]) -> Seen:
        """With one more step or window."""
        counts = added(self.counts, troubles)
        if any(trouble.worthless for trouble in troubles):
            return Seen(counts, self.norms, self.in_a_row + 1)
        found = [float(i.hypergradient_norm) for i in infos if i.hypergradient_norm is not None]
        return Seen(counts, [*self.norms, *found][-_HISTORY:])


def added(counts: Mapping[str, int], troubles: Sequence[Trouble]) -> dict[str, int]:
    """Counts by kind with those of ``troubles``."""
    total = dict(counts)
    for trouble in troubles:
        total[trouble.kind] = total.get(trouble.kind, 0) + 1
    return total


def find_troubles(
    solver: BilevelSolver,
    weighting: Weighting | None,
    before: BilevelState,
    after: BilevelState,
    infos: Sequence[StepInfo],
    seen: Seen,
) -> list[Trouble]:
    """What is wrong with a step or window; of what is not finite, the first cause.

    Reads every parameter of both levels once.

    Args:
        solver: that took it.
        weighting: of the run, whose bound the weights may be at.
        before: the state before it.
        after: and after it.
        infos: of its lower steps.
        seen: so far.
    """
    found = [trouble for info in infos for trouble in _not_finite(info)]
    for level, params in (("lower", after.lower_params), ("upper", after.upper_params)):
        if not found and not tree.allfinite(params):
            found.append(Trouble("parameters_not_finite", f"a {level} parameter is not finite"))
    if after.upper_skipped > before.upper_skipped:  # the core left the upper level as it was
        only_upper = all(trouble.kind in _UPPER_KINDS for trouble in found)
        found = [replace(trouble, worthless=not only_upper) for trouble in found]
    norm = infos[-1].hypergradient_norm
    if found or norm is None:
        return found[:1]  # the others follow from it
    found = _of_size(float(norm), seen.norms)
    if _is_cold(solver, int(before.lower_steps), len(infos)):
        text = "the first step of Adam hardly depends on the weights; set --upper-start"
        found.append(Trouble("cold_optimizer", text, worthless=False))
    weights = infos[-1].weights
    if weights is not None:
        found += _of_weights(weighting, after.upper_params, weights)
    return found


def _not_finite(info: StepInfo) -> list[Trouble]:
    """In the order in which one leads to the next."""
    scalars = {
        "lower_loss": info.lower_loss,
        "lower_gradient": info.lower_grad_norm,
        "upper_loss": info.upper_loss,
        "hypergradient": info.hypergradient_norm,
    }
    found = [
        Trouble(f"{name}_not_finite", f"{name} is {float(value)}")
        for name, value in scalars.items()
        if value is not None and not math.isfinite(float(value))
    ]
    if not _finite(info.weights) and _finite(info.losses):  # else the model gave them
        found.insert(0, Trouble("weights_not_finite", "a weight is not finite"))
    return found


def _finite(values: Tensor | None) -> bool:
    return values is None or bool(torch.isfinite(values).all())


def _of_size(norm: float, before: Sequence[float]) -> list[Trouble]:
    median = statistics.median(before) if len(before) >= _ENOUGH else None
    compared = f"hypergradient_norm is {norm:.3g}"
    if median is not None:
        compared += f", the median of the last {len(before)} is {median:.3g}"
    if median is not None and norm > _EXPLODED * median > 0:
        return [Trouble("hypergradient_exploded", compared)]
    if norm == 0 or (median is not None and norm < _VANISHED * median):
        return [Trouble("hypergradient_vanished", compared, worthless=False)]
    return []


def _is_cold(solver: BilevelSolver, lower_steps: int, taken: int) -> bool:
    """Whether the hypergradient went through nothing but the first step of the lower optimizer."""
    method = solver.hypergradient
    through = (isinstance(method, OneStep) and method.order == "lower-first") or isinstance(
        method, Unrolled
    )
    return through and lower_steps == 0 and taken == 1


def _of_weights(
    weighting: Weighting | None, upper: Mapping[str, Tensor], weights: Tensor
) -> list[Trouble]:
    found = []
    if weighting is not None and weighting.share_at_bound(upper, weights, _AT_BOUND) == 1.0:
        text = f"all weights are at an end of {weighting.bound}; lower --upper-lr"
        found.append(Trouble("weights_at_bound", text, worthless=False))
    size, count = effective_sample_size(weights), weights.numel()
    if count > 1 and size < max(1.5, _COLLAPSED * count):
        text = f"{count} examples count as {size:.2g}"
        found.append(Trouble("effective_sample_size_collapsed", text, worthless=False))
    return found
