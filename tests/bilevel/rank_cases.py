"""Runs that are taken by one process, or by several ranks that share its micro-batches.

``main``, which ``tests.rank_processes.fork_ranks`` calls, takes those of one rank, and leaves what
it found in a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from bilevel import (
    SGD,
    AdamW,
    Alone,
    Auto,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    Collective,
    ConjugateGradient,
    Dense,
    Dot,
    Ghost,
    Implicit,
    Jvp,
    LazyRowAdam,
    Neumann,
    Nystrom,
    OneStep,
    PerExample,
    Replicas,
    ResidentSolver,
    Reverse,
    ReweightingProblem,
    Unrolled,
    functional,
    tree,
)
from bilevel.hypergradients.base import Hypergradient
from weighting import DomainTable, InstanceNet, InstanceTable, Sigmoid

Batch = Mapping[str, Tensor]
ROWS, DOMAINS, TOKENS = 5000, 3, 4
"""The table is long enough to be sent entry by entry."""


class Model(nn.Module):
    """Tokens to a number: embedding, layer norm, two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width + 2)
        self.head = nn.Linear(width + 2, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.norm(self.embedding(tokens))))
        return self.head(hidden).squeeze(-1)


@dataclass(frozen=True)
class Case:
    """A run: how it is differentiated, and what of the defaults it changes."""

    hypergradient: Hypergradient
    weighting: str = "table"
    problem: str = "reweighting"
    single: bool = False  # micro-batches of one example
    empty: bool = False  # the last micro-batch of a step, the only one of its rank, has no example
    solver: Mapping[str, Any] = field(default_factory=dict)
    lower: Any = AdamW(0.02, weight_decay=0.01, max_norm=0.05)  # a clip that is active
    upper: Any = SGD(0.5)
    tolerance: float = 1e-12
    width: int = 6  # of the model
    in_place: bool = False  # on several ranks: by ResidentSolver, against one BilevelSolver


ROUTES: dict[str, tuple[Hypergradient, bool]] = {
    "auto, lower-first": (OneStep(Auto()), False),
    "auto, upper-first": (OneStep(Auto(), order="upper-first"), False),
    "dot, lower-first": (OneStep(Dot()), True),
    "dot, upper-first": (OneStep(Dot(), order="upper-first"), True),
    "ghost": (OneStep(Ghost(), order="upper-first"), False),
    "per-example": (OneStep(PerExample()), False),
    "jvp": (OneStep(Jvp()), False),
    "reverse": (OneStep(Reverse()), False),
    "averaged direction": (OneStep(Auto(), order="upper-first", direction_decay=0.5), False),
}
WINDOW = {"unroll_steps": 2}
UNROLLED: dict[str, Hypergradient] = {
    "unrolled, auto": Unrolled(),
    "unrolled, jvp": Unrolled(product=Jvp()),
    "unrolled, reverse": Unrolled(product=Reverse()),
    "unrolled, replayed": Unrolled(replay=1),
    "unrolled, truncated": Unrolled(steps=1),
}
PLAIN = SGD(0.1)
DAMPED = ConjugateGradient(iterations=80, tolerance=1e-14, damping=5.0)
IMPLICIT: dict[str, Hypergradient] = {
    "implicit, conjugate gradient": Implicit(DAMPED, stationarity_tolerance=None),
    "implicit, reverse": Implicit(DAMPED, product=Reverse()),
    "implicit, jvp": Implicit(DAMPED, product=Jvp()),
    "implicit, neumann": Implicit(Neumann(5, 0.05)),
    "implicit, nystrom": Implicit(Nystrom(4, damping=5.0)),
    "implicit, dense": Implicit(Dense(damping=5.0)),
}
CENTRAL = 1e-7  # relative: what rounding of the losses leaves of a difference of both


def cases() -> dict[str, Case]:
    """All runs, by name."""
    found = {
        f"{name}, {weighting}": Case(method, weighting, single=single)
        for weighting in ("table", "net", "domain")
        for name, (method, single) in ROUTES.items()
    }
    for name in ("auto, upper-first", "dot, upper-first", "ghost", "averaged direction"):
        method, single = ROUTES[name]
        found[f"in place, {name}"] = Case(method, "net", single=single, in_place=True)
    for weighting in ("table", "net"):
        for name, method in UNROLLED.items():
            found[f"{name}, {weighting}"] = Case(method, weighting, solver=WINDOW)
    for name, method in IMPLICIT.items():
        # A Neumann series or a least residual amplifies the rounding of H, and H is taken column by
        # column, or in many products.
        found[name] = Case(method, "domain", lower=PLAIN, tolerance=1e-11, width=3)
    central = CentralDifference()
    return found | {
        "central difference": Case(OneStep(central), tolerance=CENTRAL),
        "unrolled, central": Case(Unrolled(product=central), solver=WINDOW, tolerance=CENTRAL),
        "implicit, central": Case(
            Implicit(DAMPED, product=central), lower=PLAIN, tolerance=1e-4, width=3
        ),
        "scalar loss": Case(OneStep(), problem="scalar"),
        "held v": Case(
            OneStep(Auto(), "upper-first", 0.5, upper_gradient_every=2), problem="indirect"
        ),
        "scalar loss, unrolled": Case(Unrolled(), problem="scalar", solver=WINDOW),
        "attached features": Case(OneStep(Jvp()), "net", problem="attached"),
        "attached features, unrolled": Case(Unrolled(), "net", problem="attached", solver=WINDOW),
        "an empty part": Case(OneStep(), empty=True),
        "an empty part, unrolled": Case(Unrolled(), empty=True, solver=WINDOW),
        "rollback": Case(OneStep(), solver={"rollback": True}),
        "lazy rows": Case(OneStep(), upper=LazyRowAdam(0.1)),
        "learned rate": Case(
            OneStep(), "rate", solver={"hyperparameters": lambda phi: {"lr": phi["lr"]}}
        ),
        "learned start": Case(
            Unrolled(),
            "start",
            solver={**WINDOW, "initial": lambda phi: phi["start"]},
            lower=PLAIN,  # a new Adam in each window amplifies rounding
        ),
    }


def cases_of(ranks: int) -> list[str]:
    """The runs that so many ranks take: for three, one weighting of those with all routes."""
    wanted = ("table", "net", "domain") if ranks == 2 else ("net",)
    grids = [*ROUTES, *UNROLLED]
    return [
        name
        for name, case in cases().items()
        if case.weighting in wanted or not any(name.startswith(grid) for grid in grids)
    ]


def _sizes(case: Case, micro_batches: int) -> list[int]:
    if case.single:
        return [1] * micro_batches
    sizes = [2 + (3 * number) % 4 for number in range(micro_batches)]
    return [*sizes[:-1], 0] if case.empty else sizes


def _batch(rows: int, generator: torch.Generator) -> Batch:
    def number(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (rows, *shape), generator=generator)

    targets = torch.randn(rows, generator=generator, dtype=torch.float64)
    return {
        "tokens": number(11, TOKENS),
        "target": targets,
        "index": number(ROWS),
        "domain": number(DOMAINS),
    }


def problem_of(case: Case) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """The losses, θ and φ."""
    torch.manual_seed(0)
    model = functional(Model(case.width).double())
    weightings: dict[str, Any] = {
        "table": InstanceTable(ROWS, bound=Sigmoid(2.0), normalise="none"),
        "net": InstanceNet(2, bound=Sigmoid(2.0), centre=False, normalise=False),
        "domain": DomainTable(DOMAINS),
    }
    weighting = weightings.get(case.weighting, weightings["table"])
    phi: dict[str, Any] = weighting.init(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    phi = {
        name: leaf.double() + 0.1 * torch.randn(leaf.shape, generator=generator).double()
        for name, leaf in phi.items()
    }
    if case.weighting == "rate":
        phi["lr"] = torch.tensor(0.02, dtype=torch.float64)
    if case.weighting == "start":
        phi["start"] = {name: leaf.clone() for name, leaf in model.params.items()}

    def losses(theta: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = model(theta, batch["tokens"])
        found = (outputs - batch["target"][:, None]).square().mean(1)
        return found, {"outputs": outputs}

    def weights(upper: Any, batch: Batch, features: Mapping[str, Tensor]) -> Tensor:
        outputs = features["outputs"]
        own = torch.stack([outputs, outputs.square()], -1)
        mask = torch.ones(outputs.shape, dtype=torch.bool)
        own_names = {name: leaf for name, leaf in upper.items() if name not in ("lr", "start")}
        read = {**batch, "features": own, "feature_mask": mask}
        return weighting.batch_weights(own_names, read)

    def upper_loss(theta: Any, upper: Any, batch: Batch) -> Tensor:
        outputs = model(theta, batch["tokens"]).mean(1)
        direct: Any = 0.0
        if case.problem != "indirect":
            direct = 1e-3 * sum(leaf.square().sum() for leaf in tree.leaves(upper))
        return (torch.tanh(outputs) - batch["target"]).square().mean() + direct

    def scalar_loss(theta: Any, upper: Any, batch: Batch) -> Tensor:
        found, features = losses(theta, batch)
        return (weights(upper, batch, features) * found).mean()

    def size(batch: Batch) -> int:
        return len(batch["target"])

    if case.problem == "scalar":
        return BilevelProblem(scalar_loss, upper_loss, size), model.params, phi
    attached = case.problem == "attached"
    problem = ReweightingProblem(losses, weights, upper_loss, detach_features=not attached)
    return problem, model.params, phi


def taken(case: Case, rank: int, ranks: int, parts: int, collective: Collective) -> dict[str, Any]:
    """Take the steps of a run that ``parts`` ranks share, as one of ``ranks``.

    Args:
        case: The run.
        rank: Which of the parts is this process's.
        ranks: 1: this process takes all parts.
        parts: The ranks whose run it is.
        collective: What joins them.
    """
    problem, theta, phi = problem_of(case)
    per_rank = 1 if case.empty else 2
    own = parts // ranks * per_rank
    settings: dict[str, Any] = {"accumulation": own, **case.solver}
    kind = ResidentSolver if case.in_place and ranks > 1 else BilevelSolver
    solver: BilevelSolver[Any, Any, Any] = kind(
        problem, case.lower, case.upper, case.hypergradient, collective=collective, **settings
    )
    if ranks > 1:
        # What init overwrites with the parameters of rank 0.
        theta = tree.map(lambda leaf: leaf + rank, theta)
    state = solver.init(None if "initial" in settings else theta, phi)
    if kind is ResidentSolver:  # rank 0's values, in the memory of whoever owns θ
        assert all(state.lower_params[n].data_ptr() == theta[n].data_ptr() for n in theta)
    generator = torch.Generator().manual_seed(3)
    figures: dict[str, list[Tensor]] = {}
    for _ in range(2):
        lower = []
        for _ in range(solver.unroll_steps):
            drawn = [_batch(size, generator) for size in _sizes(case, parts * per_rank)]
            lower.append(drawn[rank * own : (rank + 1) * own])
        upper = _batch(7, generator)
        if ranks > 1:  # unequal, the third of three empty
            ends = [0, 4, 7, 7]
            upper = {name: rows[ends[rank] : ends[rank + 1]] for name, rows in upper.items()}
        state, infos = solver.advance(state, lower, upper)
        for info in infos:
            for name in ("lower_loss", "lower_grad_norm", "losses", "weights", "upper_loss"):
                if (value := getattr(info, name)) is not None:
                    figures.setdefault(name, []).append(value.reshape(-1))
    return {**tree.flatten(state), **{name: torch.cat(rows) for name, rows in figures.items()}}


def upper_size(batch: Batch) -> int:
    """Rows of a part of an upper batch."""
    return len(batch["target"])


def alone(case: Case, parts: int) -> dict[str, Any]:
    """What one process finds in the run of so many ranks."""
    return taken(case, 0, 1, parts, Alone())


def joined(store: str, rank: int, ranks: int, seconds: float = 60) -> Replicas:
    """Join the ranks of a test."""
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )
    return Replicas(upper_size)


def main(folder: Path, store: str, rank: int, ranks: int) -> None:
    """Take every run as one of the ranks, and save what was found."""
    torch.set_num_threads(1)
    collective = joined(store, rank, ranks)
    every = cases()
    found = {n: taken(every[n], rank, ranks, ranks, collective) for n in cases_of(ranks)}
    torch.save(found, folder / f"{ranks}-{rank}.pt")
    distributed.destroy_process_group()
