"""What a run should be asked: do the methods agree, is the lower level solved, does φ move.

`check_hypergradient` tells whether a hypergradient is right; the functions here tell how far
apart two of them are, and whether either can do any good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from bilevel import random_state, tree
from bilevel.hypergradient import Hypergradient
from bilevel.lower_pass import lower_pass
from bilevel.problem import Batch, Params, Problem
from bilevel.routes import Jvp
from bilevel.solver import BilevelSolver, BilevelState
from bilevel.tree import Tree

# A state, the micro-batches of each lower step of the window that starts there, an upper batch.
Window: TypeAlias = tuple[BilevelState, Sequence[Sequence[Batch]], Batch]
Bounds: TypeAlias = tuple[float, float]


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
        norms: Per point, the hypergradients' norms in the order of `names`.
        points: Per point, (a, b) -> `Agreement` of b with a for each pair, a before b in `names`.
        notes: Per method, what it had to say, once each; the table prints the last.
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
            found = self.mean(reference, name)
            row = [f"{found.cosine:.4f}", f"{least:.4f}", f"{found.norm_ratio:.3g}"]
            rows.append([name, norm, *row, f"{found.same_sign:.1%}"])
        count = len(self.points)
        head = f"hypergradients at {count} point{'s' * (count != 1)}, against {reference!r}"
        noted = [
            f"  {name}: {said[-1]}" + (f" (last of {len(said)} notes)" if len(said) > 1 else "")
            for name, said in self.notes.items()
            if said
        ]
        return "\n".join([head, *_table(rows), *noted])


def compare_hypergradients(
    solver: BilevelSolver,
    windows: Iterable[Window],
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
        memories: What methods start with, by name; for others it is their `init`.

    Cost: per window that of all methods.

    Raises:
        ValueError: Fewer than two methods, no windows, or a method that does not apply.
    """
    if len(methods) < 2:
        raise ValueError(f"methods: expected at least two to compare, found {list(methods)}")
    kept: dict[str, Any] = dict(memories or {})
    norms, points = [], []
    notes: dict[str, dict[str, None]] = {name: {} for name in methods}
    for state, batches, upper_batch in windows:
        found: dict[str, Tensor] = {}
        for name, method in methods.items():
            method.check(solver.problem, solver.lower_optimizer, len(batches))
            at = state.lower_params, state.upper_params
            if name not in kept:
                kept[name] = method.init(solver.lower_optimizer, *at)
            now = random_state.capture(state.lower_params)
            with random_state.replay(now, state.lower_params):
                result = method.window(
                    solver.problem,
                    solver.lower_optimizer,
                    *at,
                    state.lower_optimizer,
                    batches,
                    upper_batch,
                    kept[name],
                )
            kept[name] = result.memory
            notes[name].update(dict.fromkeys(result.notes))
            found[name] = _vector(result.hypergradient, state.upper_params)
        norms.append(tuple(float(vector.norm()) for vector in found.values()))
        points.append({pair: _agreement(*(found[name] for name in pair)) for pair in _pairs(found)})
    if not points:
        raise ValueError("windows: expected at least one (state, batches, upper_batch), found none")
    said = {name: tuple(lines) for name, lines in notes.items()}
    return HypergradientComparison(tuple(methods), tuple(norms), tuple(points), said)


@dataclass(frozen=True)
class Stationarity:
    """How near the lower level is to a stationary point; print it.

    Attributes:
        batches: How many.
        grad_norm: ‖ḡ‖, ḡ = ∇_θ L_lower averaged over the batches by their sizes.
        noise_norm: What ‖ḡ‖ would be expected to be if it were sampling noise alone, its standard
            error; NaN for one batch.
        alignment: ‖ḡ‖ / √(mean ‖g_b‖²): 1 if all batches pull the same way, 1/√batches if at
            random.
    """

    batches: int
    grad_norm: float
    noise_norm: float
    alignment: float

    def __str__(self) -> str:
        text = (
            f"lower gradient: norm {self.grad_norm:.2e} over {self.batches} batches, alignment "
            f"{self.alignment:.3f}"
        )
        if math.isnan(self.noise_norm):
            return f"{text}; one batch says nothing of noise"
        return f"{text}, {self.noise_norm:.2e} of it expected from sampling noise alone"


def stationarity(
    problem: Problem, lower_params: Params, upper_params: Params, batches: Iterable[Batch]
) -> Stationarity:
    """Measure the lower gradient at θ over several batches, against its own noise.

    `Implicit` and `Penalty` rest on a lower level that is solved: as long as ``grad_norm`` is well
    above ``noise_norm`` it is not, at the batches' resolution. (`Implicit` measures the same on the
    batches of one step, as a distance, with the curvature.) The noise is estimated with weights
    w_b = n_b / N, without keeping gradients::

        noise_norm² = (Σ w_b ‖g_b‖² − ‖ḡ‖²) · Σ w_b² / (1 − Σ w_b²)

    Cost: 3F per batch. Memory: two copies of θ. Random numbers are drawn but put back.

    Raises:
        ValueError: No batches.
    """
    fixed = tree.map(Tensor.detach, upper_params)
    total: Tree = None
    count, size, squared_sizes, squares = 0, 0.0, 0.0, 0.0
    with random_state.replay(random_state.capture(lower_params), lower_params):
        for batch in batches:
            passed = lower_pass(problem, Jvp(), lower_params, fixed, [batch])
            examples = passed.micro_batches[0].size
            with torch.no_grad():
                grads = passed.grads
                total = (
                    tree.scale(examples, grads)
                    if count == 0
                    else tree.axpy(float(examples), grads, total)
                )
            count, size = count + 1, size + examples
            squared_sizes += examples**2
            squares += examples * float(passed.grad_norm) ** 2
    if count == 0:
        raise ValueError("batches: expected at least one, found none")
    norm, mean_square = float(tree.norm(total)) / size, squares / size
    share = squared_sizes / size**2
    variance = max(mean_square - norm**2, 0.0)
    noise = math.sqrt(variance * share / (1.0 - share)) if count > 1 else math.nan
    aligned = norm / math.sqrt(mean_square) if mean_square > 0.0 else 0.0
    return Stationarity(count, norm, noise, aligned)


class LeafMovement(NamedTuple):
    """What happened to one leaf; `at_bound` is None without a bound."""

    name: str
    entries: int
    mean: float
    largest: float
    moved: float
    at_bound: float | None


@dataclass(frozen=True)
class Movement:
    """How far φ has come, leaf by leaf; print it.

    Of the entries' changes |Δ|: mean and largest; share of the entries that moved at all; share
    that lies at or beyond a bound afterwards.
    """

    leaves: tuple[LeafMovement, ...]

    def __str__(self) -> str:
        rows = [["", "entries", "mean |Δ|", "largest |Δ|", "moved", "at bound"]]
        for leaf in self.leaves:
            bound = "" if leaf.at_bound is None else f"{leaf.at_bound:.1%}"
            sizes = [f"{leaf.mean:.2e}", f"{leaf.largest:.2e}", f"{leaf.moved:.1%}"]
            rows.append([leaf.name, str(leaf.entries), *sizes, bound])
        return "\n".join(_table(rows))


def movement(
    before: Params, after: Params, bounds: Bounds | Mapping[str, Bounds] | None = None
) -> Movement:
    """Return how upper parameters moved between two states.

    Args:
        before: φ.
        after: φ later, of the same structure.
        bounds: (low, high) of all leaves, or of some by name ('/'-joined path, `tree.names`). In
            terms of φ itself: for a bound that maps raw weights, those at its ends.

    Raises:
        ValueError: A bound for a leaf that there is not.
    """
    olds, news = tree.flatten(before), tree.flatten(after)
    by_name = dict(bounds) if isinstance(bounds, Mapping) else dict.fromkeys(news, bounds)
    unknown = sorted(by_name.keys() - news.keys())
    if unknown:
        raise ValueError(f"bounds: expected leaves of {sorted(news)}, found {unknown}")
    found = []
    for name, (old, new) in tree.map(lambda *pair: pair, olds, news).items():
        wide = torch.promote_types(new.dtype, torch.float32)
        change = (new.detach().to(wide) - old.detach().to(wide)).abs()
        bound = by_name.get(name)
        outside = None if bound is None else (new <= bound[0]) | (new >= bound[1])
        empty = new.numel() == 0
        found.append(
            LeafMovement(
                name,
                new.numel(),
                0.0 if empty else float(change.mean()),
                0.0 if empty else float(change.max()),
                0.0 if empty else float((change > 0).double().mean()),
                None if outside is None or empty else float(outside.double().mean()),
            )
        )
    return Movement(tuple(found))


def _vector(hypergradient: Tree, upper_params: Params) -> Tensor:
    """Return all entries in one vector, zeros where φ has no influence."""
    leaves, structure = optree.tree_flatten(upper_params)
    found = structure.flatten_up_to(hypergradient)
    pieces = [
        (torch.zeros_like(leaf) if one is None else one).detach().flatten().double().cpu()
        for leaf, one in zip(leaves, found, strict=True)
    ]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)


def _agreement(first: Tensor, second: Tensor) -> Agreement:
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


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + row[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(width)}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
