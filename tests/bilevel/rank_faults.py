"""What two ranks meet when one of them goes wrong; each leaves it as JSON in the folder."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from bilevel import BilevelSolver, Dot, OneStep, Replicas
from tests.bilevel.rank_cases import PLAIN, ROWS, cases, joined, problem_of


def main(store: str, rank: int, folder: Path) -> None:
    """Go through the faults; the last kills rank 1."""
    torch.set_num_threads(1)
    collective = replace(joined(store, rank, 2), upper_size=None)
    met: dict[str, Any] = {}
    problem, theta, phi = problem_of(cases()["jvp, table"])
    solver: BilevelSolver[Any, Any, Any] = BilevelSolver(
        problem, PLAIN, PLAIN, OneStep(Dot()), collective=collective
    )
    state = solver.init(theta, phi)

    def step(rows: int, upper: bool = True) -> str:
        nonlocal state
        batch = {
            "tokens": torch.arange(4).repeat(rows, 1),
            "target": torch.ones(rows, dtype=torch.float64),
            "index": torch.arange(rows),
        }
        state, _ = solver.advance(state, [[batch]], batch if upper else None)
        return f"step {int(state.lower_steps)}"

    met["refusal"] = _met(lambda: step(1 + rank))
    met["after"], met["entries"] = _sent(lambda: _met(lambda: step(1)))
    met["parameters"] = sum(leaf.numel() for leaf in theta.values())
    met["places"] = _met(lambda: step(1, upper=rank == 0))
    met["names"] = _met(lambda: collective.first({f"weight {rank}": torch.ones(())}))
    _sums(collective, rank, met)
    if rank == 1:
        _write(folder, rank, met)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    met["killed"] = _met(lambda: step(1))
    met["seconds"] = time.monotonic() - started
    _write(folder, rank, met)


def _sums(collective: Replicas, rank: int, met: dict[str, Any]) -> None:
    values = torch.zeros(ROWS, dtype=torch.float64)
    values[rank : rank + 2] = torch.tensor([0.1, 0.2], dtype=torch.float64)  # rows 0, 1 and 1, 2
    full = torch.ones(ROWS, dtype=torch.float64)
    for name, leaf, sparse in (
        ("dense", values, False),
        ("sparse", values, True),
        ("full", full, True),
    ):
        total, met[f"{name} entries"] = _counted(collective, leaf, sparse)
        met[f"{name} sum"] = [*total[:4].tolist(), float(total.sum())]
    values[1] = torch.nan
    total, _ = _counted(collective, values, True)
    met["nan"] = [float(total[3]), str(float(total[1]))]


def _counted(collective: Replicas, leaf: Tensor, sparse: bool) -> tuple[Tensor, int]:
    """Return the sum, and how many entries this rank gave away for it."""
    return _sent(lambda: collective.sum({"raw": leaf}, {"raw": leaf}, sparse=sparse)["raw"])


def _sent(act: Callable[[], Any]) -> tuple[Any, int]:
    """Return what a function returns, and how many entries this rank gave away in it."""
    sent, reduce, gather = [0], distributed.all_reduce, distributed.all_gather

    def all_reduce(tensor: Tensor, **settings: Any) -> Any:
        sent[0] += tensor.numel()
        return reduce(tensor, **settings)

    def all_gather(parts: list[Tensor], tensor: Tensor, **settings: Any) -> Any:
        sent[0] += tensor.numel()
        return gather(parts, tensor, **settings)

    distributed.all_reduce, distributed.all_gather = all_reduce, all_gather  # type: ignore
    try:
        return act(), sent[0]
    finally:
        distributed.all_reduce, distributed.all_gather = reduce, gather


def _met(act: Callable[[], object]) -> str:
    try:
        return str(act())
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def _write(folder: Path, rank: int, met: dict[str, Any]) -> None:
    (folder / f"{rank}.json").write_text(json.dumps(met))


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]), Path(sys.argv[1]))
