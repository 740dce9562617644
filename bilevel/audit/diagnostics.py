"""Two questions to ask of a run: is the lower level solved, and does φ move?

``check_hypergradient`` tells whether a hypergradient is right, ``compare_hypergradients`` how far
apart two of them are; the functions here tell whether either can do any good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from bilevel import tree
from bilevel.audit.table import text_table
from bilevel.autodiff import random_state
from bilevel.lower.lower_pass import lower_pass
from bilevel.problem import Batch, Params, Problem
from bilevel.routes import Jvp
from bilevel.tree import Tree

Bounds: TypeAlias = tuple[float, float]


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

    ``Implicit`` and ``Penalty`` rest on a lower level that is solved: as long as ``grad_norm`` is
    well above ``noise_norm`` it is not, at the batches' resolution. (``Implicit`` measures the same
    on the batches of one step, as a distance, with the curvature.) The noise is estimated with
    weights w_b = n_b / N, without keeping gradients::

        noise_norm² = (Σ w_b ‖g_b‖² − ‖ḡ‖²) · Σ w_b² / (1 − Σ w_b²)

    Cost: 3F per batch. Memory: two copies of θ. Random numbers are drawn but put back.

    Raises:
        ValueError: No batches.
    """
    fixed = tree.map(Tensor.detach, upper_params)
    total: Tree = None
    count, size, squared_sizes, squares = 0, 0.0, 0.0, 0.0
    with random_state.rewound_to(random_state.capture(lower_params), lower_params):
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
    """What happened to one leaf; ``at_bound`` is None without a bound."""

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
        return "\n".join(text_table(rows))


def movement(
    before: Params, after: Params, bounds: Bounds | Mapping[str, Bounds] | None = None
) -> Movement:
    """Return how upper parameters moved between two states.

    Args:
        before: φ.
        after: φ later, of the same structure.
        bounds: (low, high) of all leaves, or of some by name ('/'-joined path, ``tree.names``). In
            terms of φ itself: for a bound that maps raw weights, those at its ends.

    Raises:
        ValueError: A bound for a leaf that there is not.
    """
    olds, news = tree.flatten(before), tree.flatten(after)
    by_name = dict(bounds) if isinstance(bounds, Mapping) else dict.fromkeys(news, bounds)
    unknown = sorted(by_name.keys() - news.keys())
    if unknown:
        raise ValueError(f"bounds: expected leaves of {sorted(news)}, found {unknown}")
    moved = []
    for name, (old, new) in tree.map(lambda *pair: pair, olds, news).items():
        wide = torch.promote_types(new.dtype, torch.float32)
        change = (new.detach().to(wide) - old.detach().to(wide)).abs()
        bound = by_name.get(name)
        outside = None if bound is None else (new <= bound[0]) | (new >= bound[1])
        empty = new.numel() == 0
        moved.append(
            LeafMovement(
                name,
                new.numel(),
                0.0 if empty else float(change.mean()),
                0.0 if empty else float(change.max()),
                0.0 if empty else float((change > 0).double().mean()),
                None if outside is None or empty else float(outside.double().mean()),
            )
        )
    return Movement(tuple(moved))
