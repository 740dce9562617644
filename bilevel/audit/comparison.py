"""Hypergradients of several methods at the same states: how far apart are they?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from bilevel.audit.steps import NOT_FINITE
from bilevel.audit.table import text_table
from bilevel.autodiff import random_state
from bilevel.hypergradients.base import Hypergradient, take_window
from bilevel.problem import BatchT, Lower, Params, Upper
from bilevel.solver import BilevelSolver
from bilevel.state import BilevelState
from bilevel.tree import Tree

# A state, the micro-batches of each lower step of the window that starts there, an upper batch.
ComparedWindow: TypeAlias = tuple[BilevelState[Lower, Upper], Sequence[Sequence[BatchT]], BatchT]


class Agreement(NamedTuple):
    """How a hypergradient b compares with a; NaN where one of them is 0.

    Attributes:
        cosine: ⟨a, b⟩ / (‖a‖ ‖b‖).
        norm_ratio: ‖b‖ / ‖a‖.
        same_sign: Share of the entries with the same sign, of those not 0 in both.
    """

    cosine: float
    norm_ratio: float
    same_sign: float


@dataclass(frozen=True)
class HypergradientComparison:
    """Hypergradients of several methods at the same states; print it.

    Attributes:
        names: The methods; the first is what the printed table compares with.
        norms: Per point, the hypergradients' norms in the order of ``names``.
        points: Per point, (a, b) -> ``Agreement`` of b with a for each pair, a before b in
            ``names``.
        notes: Per method, its notes, once each; the table prints the last.
    """

    names: tuple[str, ...]
    norms: tuple[tuple[float, ...], ...]
    points: tuple[Mapping[tuple[str, str], Agreement], ...]
    notes: Mapping[str, tuple[str, ...]]

    def mean(self, first: str, second: str) -> Agreement:
        """Return the means over the points; those where a hypergradient is 0 are left out."""
        pair = (first, second)
        return Agreement(*map(_mean, zip(*(point[pair] for point in self.points), strict=True)))

    def __str__(self) -> str:
        reference, *others = self.names
        rows = [["", "norm", "cosine", "least cosine", "norm ratio", "same sign"]]
        norms = [f"{_mean(column):.2e}" for column in zip(*self.norms, strict=True)]
        rows.append([reference, norms[0], "", "", "", ""])
        for name, norm in zip(others, norms[1:], strict=True):
            cosines = [point[reference, name].cosine for point in self.points]
            least = min((value for value in cosines if not math.isnan(value)), default=math.nan)
            mean = self.mean(reference, name)
            row = [f"{mean.cosine:.4f}", f"{least:.4f}", f"{mean.norm_ratio:.3g}"]
            rows.append([name, norm, *row, f"{mean.same_sign:.1%}"])
        count = len(self.points)
        head = f"hypergradients at {count} point{'s' * (count != 1)}, against {reference!r}"
        noted = [
            f"  {name}: {notes[-1]}" + (f" (last of {len(notes)} notes)" if len(notes) > 1 else "")
            for name, notes in self.notes.items()
            if notes
        ]
        return "\n".join([head, *text_table(rows), *noted])


def compare_hypergradients(
    solver: BilevelSolver[Lower, Upper, BatchT],
    windows: Iterable[ComparedWindow[Lower, Upper, BatchT]],
    methods: Mapping[str, Hypergradient],
    *,
    memories: Mapping[str, Any] | None = None,
) -> HypergradientComparison:
    """Compute the hypergradients of several methods at the same states, on the same batches.

    At one state: ``compare_hypergradients(solver, [(state, batches, upper_batch)], methods)``.
    Along a run the windows may come from a generator that takes the run's steps as it goes::

        def run(state):
            for batches, upper_batch in data:
                yield state, batches, upper_batch
                state, _ = solver.window(state, batches, upper_batch)

    Nothing is changed, and all methods see the random numbers that the window would; what a method
    keeps between windows goes from one window to the next, as if it accompanied the run.

    Args:
        solver: Problem and lower optimizer; its own hypergradient plays no part.
        windows: Where to compare.
        methods: By name; the first is the reference.
        memories: What methods start with, by name; for others it is their ``init``.

    Cost: per window that of all methods.

    Raises:
        ValueError: Fewer than two methods, no windows, a method that does not apply, or a lower
            gradient that is not finite.
    """
    if len(methods) < 2:
        raise ValueError(f"methods: expected at least two to compare, found {list(methods)}")
    kept: dict[str, Any] = dict(memories or {})
    norms, points = [], []
    notes: dict[str, dict[str, None]] = {name: {} for name in methods}
    for state, batches, upper_batch in windows:
        vectors: dict[str, Tensor] = {}
        window = solver.window_at(state, batches)
        for name, method in methods.items():
            replace(
                solver, hypergradient=method, unroll_steps=len(window.batches)
            )  # refuses what fails
            if name not in kept:
                kept[name] = method.init(
                    solver.lower_optimizer, state.lower_params, state.upper_params
                )
            now = random_state.capture(state.lower_params)
            with random_state.rewound_to(now, state.lower_params):
                _, result = take_window(window, method, upper_batch, kept[name])
            if result is None:
                raise ValueError(NOT_FINITE)
            kept[name] = result.memory
            notes[name].update(dict.fromkeys(result.notes))
            vectors[name] = _vector(result.hypergradient, state.upper_params)
        norms.append(tuple(float(vector.norm()) for vector in vectors.values()))
        points.append(
            {pair: _agreement(*(vectors[name] for name in pair)) for pair in _pairs(vectors)}
        )
    if not points:
        raise ValueError("windows: expected at least one (state, batches, upper_batch), found none")
    notes_of = {name: tuple(lines) for name, lines in notes.items()}
    return HypergradientComparison(tuple(methods), tuple(norms), tuple(points), notes_of)


def _vector(hypergradient: Tree, upper_params: Params) -> Float[Tensor, " entries"]:
    """Return all entries in one vector, zeros where φ has no influence."""
    leaves, structure = optree.tree_flatten(upper_params)
    slopes = structure.flatten_up_to(hypergradient)
    pieces = [
        (torch.zeros_like(leaf) if slope is None else slope).detach().flatten().double().cpu()
        for leaf, slope in zip(leaves, slopes, strict=True)
    ]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)


def _agreement(first: Float[Tensor, " entries"], second: Float[Tensor, " entries"]) -> Agreement:
    norms = float(first.norm()), float(second.norm())
    if not all(norms):
        return Agreement(math.nan, math.nan, math.nan)
    present = (first != 0) | (second != 0)
    same = (first.sign() == second.sign())[present]
    # Unit vectors first: the product of two small norms may underflow.
    cosine = float((first / norms[0]) @ (second / norms[1]))
    return Agreement(cosine, norms[1] / norms[0], float(same.double().mean()))


def _pairs(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    listed = list(names)
    return ((a, b) for index, a in enumerate(listed) for b in listed[index + 1 :])


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
