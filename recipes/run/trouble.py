"""Numerical troubles: what they are, how they are named, and what the run does about them.

Some kinds reject a step: a non-finite loss, gradient, hypergradient, weight or parameter, or a
hypergradient 10,000 times the median of the last ones. ``--on-trouble`` decides what follows:

* ``raise``: The run ends, and the state before the step is saved.
* ``skip``: The step, or the window of a hypergradient through several steps, is rejected.
  Parameters, optimizers, memory and random states stay as they were, bit for bit; only the count of
  steps, and so the data, advance. A non-finite hypergradient rejects its upper step only.
* ``rollback``: Both levels return to the newest checkpoint of ``--save-every``, or to the start if
  there is none yet, and the data continue after the step. PaLM was trained in this way at spikes of
  its loss (Chowdhery et al. 2022, arXiv 2204.02311, §5.1).

The other kinds are counted and logged, and the run continues.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import BilevelSolver, BilevelState, OneStep, StepInfo, Unrolled, tree
from weighting import Weighting, effective_sample_size

_HISTORY, _ENOUGH = 20, 10  # the most and the fewest hypergradient norms in the median
_EXPLODED, _VANISHED = 1e4, 1e-6  # multiples of that median
_AT_BOUND = 0.01  # a weight this share of the bound's width from an end counts as at it
_COLLAPSED = 0.1  # smallest effective share of the batch, but at least 1.5 examples
GIVE_UP = 10
"""Rejected steps in a row that end a run."""

# If the solver left out the upper step, these kinds do not reject the lower step.
_UPPER_KINDS = ("upper_loss_not_finite", "hypergradient_not_finite")


@dataclass(frozen=True)
class Trouble:
    """A numerical problem of a step.

    Attributes:
        kind: The name under which it is counted.
        text: A sentence that describes it, with the figures.
        rejects: Whether it rejects the step.
    """

    kind: str
    text: str
    rejects: bool = True


@dataclass(frozen=True)
class Seen:
    """The troubles so far and the norms for the next comparison, in a form that JSON can hold.

    Attributes:
        counts: The number of troubles by kind, over the whole run.
        norms: The last hypergradient norms of accepted steps.
        in_a_row: The number of steps or windows rejected since the last accepted one.
    """

    counts: Mapping[str, int]
    norms: Sequence[float] = field(default_factory=list)
    in_a_row: int = 0

    def after(self, troubles: Sequence[Trouble], infos: Sequence[StepInfo]) -> Seen:
        """Return the record after one more step or window."""
        counts = added(self.counts, troubles)
        if any(trouble.rejects for trouble in troubles):
            return Seen(counts, self.norms, self.in_a_row + 1)
        norms = [float(i.hypergradient_norm) for i in infos if i.hypergradient_norm is not None]
        return Seen(counts, [*self.norms, *norms][-_HISTORY:])


def added(counts: Mapping[str, int], troubles: Sequence[Trouble]) -> dict[str, int]:
    """Return the counts by kind with ``troubles`` added."""
    total = dict(counts)
    for trouble in troubles:
        total[trouble.kind] = total.get(trouble.kind, 0) + 1
    return total


class Reading(NamedTuple):
    """What the host has read of one or several lower steps.

    Attributes:
        infos: The information of each step. What ``figures_of`` and ``find_troubles`` look at is
            in the memory of the host.
        finite: Whether all parameters are finite, by level ("lower", "upper").
        at_bound: The share of the rows of a table that are at an end of the bound; None for another
            weighting, and without an upper step.
    """

    infos: tuple[StepInfo, ...]
    finite: Mapping[str, bool]
    at_bound: float | None = None


def read_steps(
    after: BilevelState[Any, Any],
    infos: Sequence[StepInfo],
    weighting: Weighting | None = None,
    *,
    lower: bool = True,
) -> Reading:
    """Read what the host has to know of steps, for which it waits for the device once.

    The arguments are those of ``to_read``.
    """
    return as_read(tree.on_host(to_read(after, infos, weighting, lower=lower)), infos)


def to_read(
    after: BilevelState[Any, Any],
    infos: Sequence[StepInfo],
    weighting: Weighting | None,
    *,
    lower: bool,
) -> dict[str, Tensor]:
    """Return what the host has to know of steps, by name, where it was computed.

    Every parameter of both levels is looked at once, on its device.

    Args:
        after: The state after the steps.
        infos: The information of each.
        weighting: The weighting of the run, or None without one.
        lower: Whether to look at the lower parameters.
    """
    levels = {"upper": after.upper_params}
    if lower:
        levels = {"lower": after.lower_params} | levels
    read = {name: tree.allfinite(params) for name, params in levels.items()}
    rows_at_bound = getattr(weighting, "rows_at_bound", None)
    if rows_at_bound is not None and infos[-1].hypergradient_norm is not None:
        read["at_bound"] = rows_at_bound(after.upper_params, _AT_BOUND)
    for number, info in enumerate(infos):
        values = {name: getattr(info, name) for name in _READ}
        values |= {f"figures/{name}": value for name, value in info.figures.items()}
        values |= {f"aux/{name}": value for name, value in beside_upper_loss(info).items()}
        there = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        read |= {f"{number}/{name}": value for name, value in there.items()}
    return read


def as_read(found: Mapping[str, Tensor], infos: Sequence[StepInfo]) -> Reading:
    """Return the reading of steps, from ``to_read`` in the memory of the host."""

    def on_host(number: int, info: StepInfo) -> StepInfo:
        values: dict[str, Any] = {name: found.get(f"{number}/{name}") for name in _READ}
        figures = {n: found.get(f"{number}/figures/{n}", v) for n, v in info.figures.items()}
        aux = {n: found.get(f"{number}/aux/{n}", v) for n, v in beside_upper_loss(info).items()}
        return info._replace(**values, figures=figures, upper_aux=aux or info.upper_aux)

    read_infos = tuple(on_host(number, info) for number, info in enumerate(infos))
    finite = {name: bool(found[name]) for name in ("lower", "upper") if name in found}
    at_bound = float(found["at_bound"]) if "at_bound" in found else None
    return Reading(read_infos, finite, at_bound)


def beside_upper_loss(info: StepInfo) -> Mapping[str, Any]:
    """Return what the upper loss returned beside its value, by name; nothing without names."""
    return info.upper_aux if isinstance(info.upper_aux, Mapping) else {}


_READ = ("lower_loss", "lower_grad_norm", "losses", "weights", "upper_loss", "hypergradient_norm")


def find_troubles(
    solver: BilevelSolver[Any, Any, Any],
    weighting: Weighting | None,
    before: BilevelState[Any, Any],
    after: BilevelState[Any, Any],
    reading: Reading,
    seen: Seen,
) -> list[Trouble]:
    """Return the troubles of a step or window; of several non-finite figures, the first cause.

    Args:
        solver: The solver that took the steps.
        weighting: The weighting of the run, for the check of its bound, or None without one.
        before: The state before the steps.
        after: The state after them.
        reading: What the host has read of them.
        seen: The troubles and hypergradient norms before these steps.
    """
    infos = reading.infos
    troubles = [trouble for info in infos for trouble in _not_finite(info)]
    for level, finite in reading.finite.items():
        if not troubles and not finite:
            troubles.append(Trouble("parameters_not_finite", f"a {level} parameter is not finite"))
    if after.upper_skipped > before.upper_skipped:  # the solver left the upper level unchanged
        only_upper = all(trouble.kind in _UPPER_KINDS for trouble in troubles)
        troubles = [replace(trouble, rejects=not only_upper) for trouble in troubles]
    norm = infos[-1].hypergradient_norm
    if troubles or norm is None:
        return troubles[:1]  # the other non-finite figures follow from the first
    troubles = _of_size(float(norm), seen.norms)
    if _is_cold(solver, int(after.lower_steps) - len(infos), len(infos)):
        text = "the first step of Adam hardly depends on the weights; set --upper-start"
        troubles.append(Trouble("cold_optimizer", text, rejects=False))
    weights = infos[-1].weights
    if weights is not None:
        share = reading.at_bound
        if weighting is not None and share is None:
            share = weighting.share_at_bound(after.upper_params, weights, _AT_BOUND)
        troubles += _of_weights(weighting, share, weights)
    return troubles


def _not_finite(info: StepInfo) -> list[Trouble]:
    """Return the non-finite figures of a step, causes before their effects."""
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
    if not _finite(info.weights) and _finite(info.losses):  # else the model is the cause
        text = (
            "a weight is not finite (as normalised ones are whose mean is too small, on a device)"
        )
        troubles.insert(0, Trouble("weights_not_finite", text))
    return troubles


def _finite(values: Tensor | None) -> bool:
    return values is None or bool(torch.isfinite(values).all())


def _of_size(norm: float, before: Sequence[float]) -> list[Trouble]:
    """Return the trouble of a norm that is zero or far from the median of the last ones."""
    median = statistics.median(before) if len(before) >= _ENOUGH else None
    compared = f"hypergradient_norm is {norm:.3g}"
    if median is not None:
        compared += f", the median of the last {len(before)} is {median:.3g}"
    if median is not None and norm > _EXPLODED * median > 0:
        return [Trouble("hypergradient_exploded", compared)]
    if norm == 0 or (median is not None and norm < _VANISHED * median):
        return [Trouble("hypergradient_vanished", compared, rejects=False)]
    return []


def last_norms(norms: Tensor) -> Tensor:
    """Return the norms with which the next hypergradient is compared."""
    return norms[-_HISTORY:]


def largest_norm(before: Tensor) -> Tensor | None:
    """Return from where on a hypergradient has exploded, on the device of the last norms, [norms].

    None: there are too few of them.
    """
    if len(before) < _ENOUGH:
        return None
    ordered, half = before.sort().values, len(before) // 2
    median = ordered[half] if len(before) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return torch.where(median > 0, _EXPLODED * median, torch.inf)


def _is_cold(solver: BilevelSolver[Any, Any, Any], lower_steps: int, taken: int) -> bool:
    """Return whether the hypergradient saw only the first step of the lower optimizer."""
    method = solver.hypergradient
    through = (isinstance(method, OneStep) and method.order == "lower-first") or isinstance(
        method, Unrolled
    )
    return through and lower_steps == 0 and taken == 1


def _of_weights(
    weighting: Weighting | None, at_bound: float | None, weights: Tensor
) -> list[Trouble]:
    """Return the troubles of weights: all at an end of the bound, or on few examples."""
    troubles = []
    if weighting is not None and at_bound == 1.0:
        text = f"all weights are at an end of {weighting.bound}; lower --upper-lr"
        troubles.append(Trouble("weights_at_bound", text, rejects=False))
    size, count = effective_sample_size(weights), weights.numel()
    if count > 1 and size < max(1.5, _COLLAPSED * count):
        text = f"{count} examples count as {size:.2g}"
        troubles.append(Trouble("effective_sample_size_collapsed", text, rejects=False))
    return troubles
