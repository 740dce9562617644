"""What two ranks with shards meet when something is wrong; each leaves it as JSON in the folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bilevel import SGD, Dot, OneStep, ResidentSolver, ReweightingProblem, Shards, sharded


class Branches(nn.Module):
    """A linear layer, and another that an input below zero does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.first(x) + (self.second(x) if float(x.sum()) >= 0.0 else 0.0)
        return found * 1.0


class Run:
    """A solver over two ranks, and its state."""

    def __init__(self, policy: MixedPrecisionPolicy | None = None) -> None:
        torch.manual_seed(0)
        model, mesh = Branches(), init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
        f = sharded(model)
        problem: ReweightingProblem[Any, Any, Any] = ReweightingProblem(
            lambda theta, x: (f(theta, x).square().mean(1), None),
            lambda phi, x, features: phi.expand(len(x)),
            lambda theta, phi, x: f(theta, x).square().mean(),
        )
        self.solver = ResidentSolver(
            problem,
            SGD(0.1),
            SGD(0.1),
            OneStep(Dot(), "upper-first"),
            collective=Shards(f, len),
        )
        self.state = self.solver.init(f.module_params, torch.ones(()))

    def step(self, lower: Tensor, upper: Tensor | None) -> str:
        """Take a step of one micro-batch."""
        self.state, _ = self.solver.advance(self.state, [[lower]], upper)
        return f"step {int(self.state.lower_steps)}"


def met(act: Callable[[], str]) -> str:
    """What a function returns, or the error that it raises."""
    try:
        return act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(store: str, rank: int, folder: Path) -> None:
    """Go through the faults; the last ends rank 1."""
    from tests.bilevel.shard_cases import joined

    joined(store, rank, 2)
    run, one = Run(), torch.ones(1, 3)
    found = {
        "a step": met(lambda: run.step(one, one)),
        "an empty part": met(lambda: run.step(one, one[rank:])),
        "places": met(lambda: run.step(one, one if rank else None)),
    }
    run = Run()
    found["micro-batches"] = met(lambda: _pass(run, [one] * (1 + rank)))
    found["mixed precision"] = met(
        lambda: Run(MixedPrecisionPolicy(reduce_dtype=torch.float64)).step(one, one)
    )
    run = Run()
    sign = -1.0 if rank else 1.0
    found["a branch"] = met(lambda: run.step(one * sign, None))
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def _pass(run: Run, batches: list[Tensor]) -> str:
    """Run a lower pass of so many micro-batches, which a solver would refuse."""
    from bilevel.shards.passes import lower_pass

    state, collective = run.state, run.solver.collective
    assert isinstance(collective, Shards)
    lower_pass(collective, run.solver.problem, state.lower_params, state.upper_params, batches)
    return "a pass"


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]), Path(sys.argv[1]))
