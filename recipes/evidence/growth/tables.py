"""Time, memory and checkpoints of a step against the rows of an Instance Table.

The lower model is one layer of 65 parameters, so that the table is all that a step costs. A step is
one of ``train``: 32 examples, order upper-first, AdamW or ``LazyRowAdam`` on the table, and what
the loop looks at after it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import (
    AdamW,
    BilevelSolver,
    LazyRowAdam,
    OneStep,
    Projected,
    ReweightingProblem,
    StepInfo,
    tree,
)
from recipes.evidence.bench.measure import with_peak
from recipes.evidence.growth.fit import milliseconds
from recipes.run.trouble import Seen, find_troubles, read_steps
from recipes.tensor_file import write_tensors
from weighting import InstanceTable, Sigmoid

SIZES = (10**3, 10**4, 10**5, 10**6, 10**7)
WIDTH, BATCH = 64, 32
UPPER: dict[str, Any] = {"adam": AdamW(1e-2), "lazy-adam": LazyRowAdam(1e-2)}


def problem_of(table: InstanceTable) -> ReweightingProblem[Any, Any, Any]:
    """Return a regression with a weight per example."""

    def losses(theta: Any, batch: Any) -> tuple[Tensor, None]:
        return (batch["x"] @ theta["w"] + theta["b"] - batch["y"]).square(), None

    return ReweightingProblem(
        losses,
        lambda phi, batch, _: table.batch_weights(phi, batch),
        lambda theta, phi, batch: losses(theta, batch)[0].mean(),
    )


def batch_of(rows: int, seed: int) -> dict[str, Tensor]:
    """Return a batch of different rows of the table."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.randint(rows // BATCH, (BATCH,), generator=draw) + rows // BATCH * torch.arange(
        BATCH
    )
    x = torch.randn(BATCH, WIDTH, generator=draw)
    return {"x": x, "y": torch.randn(BATCH, generator=draw), "index": index}


class Stepping:
    """A solver with its state, for one size of the table."""

    def __init__(self, rows: int, optimizer: Any) -> None:
        self.table = InstanceTable(rows, bound=Sigmoid(2.0))
        upper = Projected(optimizer, self.table.project)
        self.solver: BilevelSolver[Any, Any, Any] = BilevelSolver(
            problem_of(self.table), AdamW(1e-3), upper, OneStep(order="upper-first")
        )
        theta = {"w": torch.zeros(WIDTH), "b": torch.zeros(())}
        self.state = self.solver.init(theta, self.table.init())
        self.batch, self.upper_batch = batch_of(rows, 1), batch_of(rows, 2)
        self.infos: tuple[StepInfo, ...] = ()
        self.step()

    def step(self) -> None:
        """Take the step, always from the same state."""
        self.after, self.infos = self.solver.advance(self.state, [[self.batch]], self.upper_batch)

    def judge(self) -> None:
        """Do what the loop does with a step before it goes on."""
        reading = read_steps(self.after, self.infos)
        find_troubles(self.solver, self.table, self.state, self.after, reading, Seen({}))

    def checkpoint(self, folder: Path) -> Path:
        """Write the state as a checkpoint holds it."""
        path = folder / "state.safetensors"
        write_tensors(path, tree.flatten(self.after))
        return path


def measured(name: str, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Return the figures of a step for each size, with an upper optimizer.

    ``state_bytes`` is what the state holds, ``step_bytes`` what a step allocates beyond it.
    """
    found = []
    for size in sizes:
        one = Stepping(size, UPPER[name])
        timed: dict[str, Callable[[], Any]] = {"step_ms": one.step, "judge_ms": one.judge}
        with tempfile.TemporaryDirectory() as folder:
            timed["checkpoint_ms"] = partial(one.checkpoint, Path(folder))
            times = milliseconds(timed, rounds)
            written = one.checkpoint(Path(folder)).stat().st_size
        one.infos, one.after = (), one.state
        found.append(
            {
                "size": size,
                **times,
                "state_bytes": sum(leaf.nbytes for leaf in tree.leaves(one.state)),
                "step_bytes": with_peak(one.step)[1],
                "checkpoint_bytes": written,
            }
        )
    return found
