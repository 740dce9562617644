"""Copies of θ at the peak of an iteration: ``python -m recipes.evidence.bench copies``.

The model is a chain of equal layers, so that a copy of θ is no multiple of the largest leaf, with
Adam's two moments and small activations. What is counted is all memory that torch's allocator hands
out, θ and moments included, in units of θ.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel import (
    SGD,
    Adam,
    BilevelSolver,
    CentralDifference,
    ConjugateGradient,
    Dot,
    Ghost,
    Hypergradient,
    Implicit,
    Jvp,
    OneStep,
    Penalty,
    PerExample,
    ResidentSolver,
    Reverse,
    ReweightingProblem,
    Unrolled,
    tree,
)
from recipes.evidence.bench.measure import with_peak
from recipes.run.files import write_json
from recipes.run.provenance import environment

WIDTH, LAYERS = 512, 24


@dataclass(frozen=True)
class Counted:
    """An iteration whose copies are counted.

    Attributes:
        name: For the table.
        method: The hypergradient.
        needs: What its equation needs at once: S is θ with Adam's moments, 3 copies, the others
            are one each (docs/cost.md says which).
        batches: The examples of each micro-batch of a step.
        steps: Lower steps of a window.
        upper: Whether an upper step follows.
        resident: Whether ``ResidentSolver`` has an execution of it, too.
    """

    name: str
    method: Hypergradient
    needs: str
    batches: tuple[int, ...] = (4,)
    steps: int = 1
    upper: bool = True
    resident: bool = False

    @property
    def needed(self) -> int:
        """The copies of θ that the functional execution needs."""
        terms = [term.split() for term in self.needs.split(" + ")]
        return sum(
            (3 if term[-1] == "S" else 1) * (int(term[0]) if len(term) > 1 else 1) for term in terms
        )


COUNTED = [
    Counted("plain", OneStep(order="upper-first"), "2 S + g", upper=False, resident=True),
    Counted("dot, lower-first", OneStep(Dot()), "2 S + g + g_i + v + μ", (1,), resident=True),
    Counted("dot, upper-first", OneStep(Dot(), "upper-first"), "2 S + g", (1, 1, 1), resident=True),
    Counted(
        "dot, upper-first, average",
        OneStep(Dot(), "upper-first", 0.9),
        "2 S + 2 v̄ + g",
        (1, 1, 1),
        resident=True,
    ),
    Counted("ghost, upper-first", OneStep(Ghost(), "upper-first"), "2 S + g", resident=True),
    Counted(
        "ghost, upper-first, average",
        OneStep(Ghost(), "upper-first", 0.9),
        "2 S + 2 v̄ + g",
        resident=True,
    ),
    Counted("jvp, upper-first", OneStep(Jvp(), "upper-first"), "2 S + g + μ", resident=True),
    Counted("per-example, lower-first", OneStep(PerExample()), "2 S + g + v + μ"),
    Counted("jvp, lower-first", OneStep(Jvp()), "2 S + g + v + μ"),
    Counted("reverse, lower-first", OneStep(Reverse()), "2 S + g + v + μ"),
    Counted("central difference, lower-first", OneStep(CentralDifference()), "2 S + g + v + μ"),
    Counted("unrolled, 4 steps", Unrolled(), "4 S + 4 g + v + 3 μ", steps=4),
    Counted(
        "implicit, 5 iterations of CG",
        Implicit(ConjugateGradient(iterations=5, tolerance=0.0, damping=1.0)),
        "2 S + q + g + v + x + r + p + 2 Hp",
    ),
    Counted("penalty", Penalty(10.0), "4 S + g"),
]


class Chain(nn.Module):
    """Equal linear layers with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """Return a loss per example, [batch]."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean(-1)


def copies(one: Counted, resident: bool) -> float:
    """Return the most bytes alive at once in an iteration, over those of θ.

    The module's own parameters, from which a functional solver clones θ, are not counted.
    """
    torch.manual_seed(0)
    module = Chain()

    def losses(params: Any, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(module, dict(params), (batch["x"],))
        return found

    problem: ReweightingProblem[Any, Any, Any] = ReweightingProblem(
        lambda theta, batch: (losses(theta, batch), None),
        lambda phi, batch, features: phi[batch["i"]],
        lambda theta, phi, batch: losses(theta, batch).mean(),
    )
    theta = {name: leaf.detach() for name, leaf in module.named_parameters()}
    rows = [{"x": torch.randn(n, WIDTH), "i": torch.arange(n)} for n in one.batches]
    solver: BilevelSolver[Any, Any, Any] = (ResidentSolver if resident else BilevelSolver)(
        problem,
        Adam(1e-4),
        SGD(0.1),
        one.method,
        unroll_steps=one.steps,
        accumulation=len(rows),
    )
    state = solver.init(theta, torch.linspace(0.5, 1.5, 8))
    upper = rows[0] if one.upper else None
    state, _ = solver.advance(state, [rows] * one.steps, upper)  # Rules are verified at first.
    held = sum(leaf.nbytes for leaf in tree.leaves((state.lower_params, state.lower_optimizer)))
    held += sum(leaf.nbytes for leaf in tree.leaves(state.memory))
    size = sum(leaf.nbytes for leaf in tree.leaves(state.lower_params))
    _, peak = with_peak(lambda: solver.advance(state, [rows] * one.steps, upper))
    return (held + peak) / size


def main(arguments: Sequence[str]) -> None:
    """Count, print and, with ``--output``, write the rows."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.bench copies",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--output", help="JSON, e.g. results/bench_copies.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    print(f"{'route':<36}{'needed':>8}{'functional':>12}{'resident':>10}")
    for one in COUNTED:
        functional = copies(one, resident=False)
        resident = copies(one, resident=True) if one.resident else None
        row = {
            "route": one.name,
            "needs": one.needs,
            "needed": one.needed,
            "functional": round(functional, 1),
            "resident": None if resident is None else round(resident, 1),
        }
        rows.append(row)
        shown = "" if row["resident"] is None else row["resident"]
        print(f"{one.name:<36}{one.needed:>8}{row['functional']:>12}{shown:>10}")
    if given.output:
        about = {"command": " ".join(["python -m recipes.evidence.bench copies", *arguments])}
        write_json(Path(given.output), about | {"environment": environment(), "rows": rows})
