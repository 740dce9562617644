"""A run over shards that is saved, or goes on from what other numbers of ranks have saved.

``python -m tests.bilevel.shard_checkpoints FOLDER STORE RANK RANKS``: in a folder named ``saved``
it takes the first steps and saves; in another, beside it, it goes on from each of the former.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint

from bilevel import SGD, ResidentSolver, Shards, sharded, tree
from tests.bilevel.shard_cases import (
    AVERAGED,
    SCHEDULE,
    Case,
    batch_of,
    joined,
    problem_of,
    spread,
    taken,
    upper_size,
)

CASE = Case("net", AVERAGED, SCHEDULE, steps=6)
MICRO_BATCHES, SAVED = 6, 3
"""Of a step, shared by the ranks; and the steps after which a run is saved."""


def main(folder: Path, store: str, rank: int, ranks: int) -> None:
    """Save, or go on."""
    joined(store, rank, ranks)
    f = sharded(spread(CASE, ranks))
    problem, phi = problem_of(CASE, f)
    solver: Any = ResidentSolver(
        problem,
        CASE.lower,
        SGD(0.5),
        CASE.method,
        accumulation=MICRO_BATCHES // ranks,
        collective=Shards(f, upper_size),
    )
    state = solver.init(f.module_params, phi)

    def to(state: Any, first: int, last: int) -> Any:
        return taken(solver, state, CASE, rank, ranks, MICRO_BATCHES, first, last)[0]

    if folder.name == "saved":
        state = to(state, 0, SAVED)
        checkpoint.save(tree.flatten(f.distributed(state)), checkpoint_id=folder / f"by-{ranks}")
    else:
        for by in (1, 2, 3):
            # Other values, and a root that an evaluation of them has left whole.
            state = to(state, 0, 1)
            tokens = batch_of(2, torch.Generator().manual_seed(0))["tokens"]
            with torch.no_grad():
                before = f(state.lower_params, tokens)
            checkpoint.load(
                tree.flatten(f.distributed(state)),
                checkpoint_id=folder.parent / "saved" / f"by-{by}",
            )
            with torch.no_grad():
                after = f(state.lower_params, tokens)
            loaded: dict[str, Tensor] = tree.flatten(f.gathered(state))
            loaded = {name: leaf.clone() for name, leaf in loaded.items()}
            found = {
                "loaded": loaded,
                "before": before,
                "after": after,
                "end": tree.flatten(f.gathered(to(state, SAVED, CASE.steps))),
            }
            state = solver.init(f.module_params, phi)
            torch.save(found, folder / f"{by}-{ranks}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
