"""A run over shards that is saved, or goes on from what other numbers of ranks have saved.

``main`` takes the first steps and saves in a folder named ``saved``; in another, beside it, it goes
on from each of the former. ``tests.rank_processes.fork_ranks`` calls it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed

from bilevel import (
    SGD,
    ResidentSolver,
    Shards,
    load_shards,
    save_shards,
    saving_shards,
    sharded,
    tree,
)
from bilevel.shards import checkpoint as shards_checkpoint
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


def _after(event: threading.Event, write: Any) -> Any:
    def wait_and_write(*arguments: Any) -> None:
        assert event.wait(60)
        write(*arguments)

    return wait_and_write


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
        save_shards(folder / f"by-{ranks}", f, state)
        moved = threading.Event()
        with patch.object(shards_checkpoint, "_write", _after(moved, shards_checkpoint._write)):
            saving = saving_shards(folder / f"aside-{ranks}", f, state)
            to(state, SAVED, CASE.steps)  # in place
            moved.set()
            saving.finish()
    else:
        for by in (1, 2, 3):
            # Other values, and a root that an evaluation of them has left whole.
            state = to(state, 0, 1)
            tokens = batch_of(2, torch.Generator().manual_seed(0))["tokens"]
            with torch.no_grad():
                before = f(state.lower_params, tokens)
            load_shards(folder.parent / "saved" / f"by-{by}", f, state)
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
