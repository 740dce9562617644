"""Bytes that a rank sends and holds in a step over shards of θ, and over whole copies of it.

Processes of torch.distributed (gloo) take steps in place, ``Dot`` upper-first, on a chain of equal
layers (that of ``bench copies``): 6 micro-batches of one example and an upper batch of 6, divided
among them. Memory is the allocator's record on top of θ and the optimizer's state; what gloo itself
allocates for a message is not in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from bilevel import (
    SGD,
    Adam,
    Dot,
    OneStep,
    Replicas,
    ResidentSolver,
    ReweightingProblem,
    Shards,
    functional,
    sharded,
    tree,
)
from recipes.evidence.bench import copies
from recipes.evidence.bench.measure import with_peak
from recipes.evidence.growth.ranks import counted, joined, of_ranks

SIZES = (2, 3)
KINDS = ("whole", "shards")
EXAMPLES = 6  # of each level, of all ranks


def sent(handed: Mapping[str, float], ranks: int) -> float:
    """Return the bytes that a rank sends, of those that it hands to the collectives.

    A sum is a ring's, 2 (R − 1) / R of it. What is gathered goes to each of the others, and of an
    all-to-all and a broadcast, of which this is the most, that part which is theirs.
    """
    others = ranks - 1
    share = {
        "all_reduce": 2 * others / ranks,
        "all_gather": others,
        "all_gather_single": others,
        "all_to_all_single": others / ranks,
        "broadcast": others,
    }
    return sum(share[name] * count for name, count in handed.items())


def steps(rank: int, ranks: int, kind: str) -> dict[str, Any]:
    """Take two steps of a rank in a group; return the figures of the second."""
    torch.manual_seed(0)
    module: Any = copies.Chain()
    whole = sum(leaf.nbytes for leaf in module.parameters())
    if kind == "shards":
        for layer in module.layers:
            fully_shard(layer)
        fully_shard(module)
        f: Any = sharded(module)
        collective: Any = Shards(f, lambda batch: len(batch["i"]))
    else:
        f = functional(module)
        collective = Replicas(lambda batch: len(batch["i"]))

    def losses(theta: Any, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = f(theta, batch["x"])
        return found

    problem: ReweightingProblem[Any, Any, Any] = ReweightingProblem(
        lambda theta, batch: (losses(theta, batch), None),
        lambda phi, batch, features: phi[batch["i"]],
        lambda theta, phi, batch: losses(theta, batch).mean(),
    )
    own = EXAMPLES // ranks
    solver: Any = ResidentSolver(
        problem,
        Adam(1e-4),
        SGD(0.1),
        OneStep(Dot(), "upper-first"),
        accumulation=own,
        collective=collective,
    )
    state = solver.init(f.module_params, torch.linspace(0.5, 1.5, EXAMPLES))
    draw = torch.Generator().manual_seed(rank)
    rows = [
        {"x": torch.randn(1, copies.WIDTH, generator=draw), "i": torch.tensor([rank * own + place])}
        for place in range(own)
    ]
    upper = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    state, _ = solver.advance(state, [rows], upper)
    held = sum(leaf.nbytes for leaf in tree.leaves((state.lower_params, state.lower_optimizer)))
    with counted() as handed:
        _, peak = with_peak(lambda: solver.advance(state, [rows], upper))
    return {
        "theta_bytes": whole,
        "held_bytes": held,
        "peak_bytes": held + peak,
        "sent_bytes": round(sent(handed, ranks)),
        "bytes_by_call": handed,
    }


def worker(store: str, rank: int, ranks: int, output: str, kind: str) -> None:
    """Take the steps as one of the ranks, and write its figures."""
    with joined(store, rank, ranks):
        Path(output).write_text(json.dumps(steps(rank, ranks, kind)), encoding="utf-8")


def measured(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return, for both kinds and each number of ranks, the figures of the rank that has the most.

    Raises:
        subprocess.CalledProcessError: A rank failed.
    """
    found = []
    for kind in KINDS:
        for ranks in sizes:
            ran = of_ranks("recipes.evidence.growth.shards", ranks, kind)
            most = max(ran, key=lambda one: one["peak_bytes"])
            found.append({"kind": kind, "size": ranks, **most})
    return found


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
