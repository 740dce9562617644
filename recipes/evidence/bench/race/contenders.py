"""The contenders of the race, each an iteration on one shared θ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel import AdamW, Dot, Ghost, OneStep, ResidentSolver, tree
from bilevel.tree import Tree, TreeT
from prm.inputs.collate import Batch
from recipes.evidence.bench.race.model import Race
from recipes.evidence.bench.race.original import MAX_NORM, Adamw, Original
from recipes.method.objective import State

ORIGINAL, FLOOR, DOT, GHOST = "original", "floor", "resident dot", "resident ghost"


@dataclass(frozen=True)
class Contender:
    """One row.

    Attributes:
        route: Its name.
        run: One iteration; it returns the hypergradient [instances], None for the floor.
        examples: Lower examples of an iteration, and as many upper ones.
    """

    route: str
    run: Callable[[], Tensor | None]
    examples: int = 1


def contenders(race: Race, batch_size: int) -> list[Contender]:
    """Return the floor, the original, and ours for one example and for ``batch_size``."""
    ours = {
        DOT: (OneStep(Dot()), 1),
        GHOST: (OneStep(Ghost(), "upper-first"), batch_size),
    }
    lower, upper = race.batch(1, 1), race.batch(1, 2)
    original = Original(race)
    found = [
        Contender(FLOOR, floor(race, lower, upper)),
        Contender(ORIGINAL, lambda: original.iteration(lower, upper)),
    ]
    for route, (method, size) in ours.items():
        batches = race.batch(size, 1), race.batch(size, 2)
        found.append(Contender(route, partial(Resident(race, method).iteration, *batches), size))
    return found


@dataclass(frozen=True)
class Report:
    """An upper optimizer that leaves φ as it is, and whose state is the last hypergradient."""

    def init(self, params: Tree) -> Tree:
        """Return zeros."""
        return tree.zeros_like(params)

    def update(self, grads: Tree, state: Tree, params: TreeT) -> tuple[TreeT, Tree]:
        """Return φ and its gradient."""
        return params, grads


class Resident:
    """Iterations of ``ResidentSolver``.

    Args:
        race: θ and its moments.
        method: The hypergradient.
    """

    def __init__(self, race: Race, method: OneStep) -> None:
        self._race = race
        one = Adamw()
        self._solver = ResidentSolver(
            race.objective.problem(),
            AdamW(one.lr, weight_decay=one.decay, max_norm=MAX_NORM),
            Report(),
            method,
        )
        self._fields = {
            "upper_optimizer": self._solver.upper_optimizer.init(race.weights),
            "memory": None,
        }

    def iteration(self, lower: Batch, upper: Batch) -> Tensor:
        """Take a lower step, and return the hypergradient [instances]."""
        race = self._race
        zero = torch.zeros((), dtype=torch.int64)
        counts = {
            name: zero.clone()
            for name in ("lower_steps", "upper_steps", "upper_skipped", "lower_skipped")
        }
        state: State = State(race.params, race.weights, race.state, **self._fields, **counts)
        after, _ = self._solver.advance(state, [[lower]], upper)
        race.state.steps.copy_(after.lower_optimizer.steps)
        reported: Any = after.upper_optimizer
        found: Tensor = reported["deviation"]
        return found


def floor(race: Race, lower: Batch, upper: Batch) -> Callable[[], None]:
    """Return an iteration of what no method can leave out: both gradients and one fused AdamW."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in race.params.items()}
    one = Adamw()
    optimizer = torch.optim.AdamW(
        leaves.values(),
        lr=one.lr,
        betas=(one.beta1, one.beta2),
        eps=one.eps,
        weight_decay=one.decay,
        fused=True,
    )
    first: Any = race.state.first_moment
    second: Any = race.state.second_moment
    counts = [torch.zeros((), device=leaf.device) for leaf in leaves.values()]
    for (name, leaf), count in zip(leaves.items(), counts, strict=True):
        optimizer.state[leaf] = {"step": count, "exp_avg": first[name], "exp_avg_sq": second[name]}
    objective, known = race.objective, 0

    def iteration() -> None:
        nonlocal known
        if known != int(race.state.steps):  # Another contender has moved θ.
            known = int(race.state.steps)
            for count in counts:
                count.fill_(known)
        objective.per_example_loss(leaves, lower)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        race.state.steps.add_(1)
        known += 1
        objective.upper_loss(leaves, race.weights, upper).backward()
        optimizer.zero_grad()

    return iteration


def forward(race: Race) -> Callable[[], None]:
    """Return a forward pass of the lower loss without a graph."""
    batch = race.batch(1, 1)

    def run() -> None:
        with torch.no_grad():
            race.objective.per_example_loss(race.params, batch)

    return run


def with_graph(race: Race, size: int) -> Callable[[], Tensor]:
    """Return a forward pass that keeps what its backward pass needs: the activations."""
    batch = race.batch(size, 1)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in race.params.items()}
    return lambda: race.objective.per_example_loss(leaves, batch)[0]
