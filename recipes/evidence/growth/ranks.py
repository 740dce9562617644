"""Bytes sent and processor time of a step against the number of ranks.

Processes of torch.distributed (gloo) take the steps of one run: 6 micro-batches of 64 examples each
and an upper batch of 384, divided among them. Counted is what each rank hands to the collectives
of ``torch.distributed``: the tensors of the seam, not what a transport makes of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.func import functional_call

from bilevel import (
    AdamW,
    BilevelSolver,
    OneStep,
    Replicas,
    ReweightingProblem,
    tree,
)
from bilevel.collective import ALONE, Collective
from weighting import InstanceTable, Sigmoid

SIZES = (1, 2, 3)
WIDTH, LAYERS, TABLE = 512, 4, 100_000
MICRO_BATCHES, EXAMPLES, STEPS = 6, 64, 8
_PLACE = {  # of the tensor that is handed over, in the arguments
    "all_reduce": 0,
    "broadcast": 0,
    "all_gather": 1,
    "all_gather_single": 1,
    "all_to_all_single": 1,
}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the bytes that this process hands to each collective while the body runs."""
    sent: dict[str, int] = {}
    originals = {name: getattr(distributed, name) for name in _PLACE}

    def counting(name: str) -> Callable[..., Any]:
        def called(*arguments: Any, **more: Any) -> Any:
            sent[name] = sent.get(name, 0) + arguments[_PLACE[name]].nbytes
            return originals[name](*arguments, **more)

        return called

    try:
        for name in _PLACE:
            setattr(distributed, name, counting(name))
        yield sent
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


def problem_of(width: int, layers: int, rows: int) -> tuple[Any, dict[str, Tensor], Any]:
    """Return a regression by linear layers with a weight per example, θ and φ."""
    torch.manual_seed(0)
    parts = [
        part for _ in range(layers) for part in (torch.nn.Linear(width, width), torch.nn.Tanh())
    ]
    module = torch.nn.Sequential(*parts)
    table = InstanceTable(rows, bound=Sigmoid(2.0), normalise="none")

    def losses(theta: Any, batch: Any) -> tuple[Tensor, None]:
        return (functional_call(module, theta, (batch["x"],)).mean(1) - batch["y"]).square(), None

    problem: Any = ReweightingProblem(
        losses,
        lambda phi, batch, _: table.batch_weights(phi, batch),
        lambda theta, phi, batch: losses(theta, batch)[0].mean(),
    )
    return problem, {n: p.detach().clone() for n, p in module.named_parameters()}, table.init()


def batch_of(examples: int, width: int, rows: int, seed: int) -> dict[str, Tensor]:
    """Return a batch of examples of the table."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(examples, width, generator=draw),
        "y": torch.randn(examples, generator=draw),
        "index": torch.randint(rows, (examples,), generator=draw),
    }


def steps(rank: int, ranks: int, collective: Collective) -> dict[str, Any]:
    """Take the steps of a rank; return its figures, means over the steps after the first."""
    problem, theta, phi = problem_of(WIDTH, LAYERS, TABLE)
    own = MICRO_BATCHES // ranks
    solver: Any = BilevelSolver(
        problem,
        AdamW(1e-3),
        AdamW(1e-2),
        OneStep(order="upper-first"),
        accumulation=own,
        collective=collective,
    )
    state = solver.init(theta, phi)
    lower = [batch_of(EXAMPLES, WIDTH, TABLE, seed) for seed in range(rank * own, (rank + 1) * own)]
    upper = batch_of(MICRO_BATCHES * EXAMPLES // ranks, WIDTH, TABLE, 100 + rank)
    state, _ = solver.advance(state, [lower], upper)
    with counted() as sent:
        started = time.process_time()
        for _ in range(STEPS):
            state, _ = solver.advance(state, [lower], upper)
        seconds = time.process_time() - started
    return {
        "cpu_ms": 1000 * seconds / STEPS,
        "bytes": sum(sent.values()) / STEPS,
        "theta_bytes": sum(leaf.nbytes for leaf in tree.leaves(theta)),
        "phi_bytes": sum(leaf.nbytes for leaf in tree.leaves(phi)),
        "bytes_by_call": {name: count / STEPS for name, count in sent.items()},
    }


@contextmanager
def joined(store: str, rank: int, ranks: int) -> Iterator[None]:
    """Let this process be one of the ranks of a group while the body runs."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def of_ranks(module: str, ranks: int, *words: str) -> list[dict[str, Any]]:
    """Return what ``python -m module STORE RANK RANKS OUTPUT WORDS`` writes on each rank.

    Raises:
        subprocess.CalledProcessError: A rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        command = [sys.executable, "-m", module, f"{folder}/store"]
        started = [
            subprocess.Popen([*command, str(rank), str(ranks), str(output), *words])
            for rank, output in enumerate(outputs)
        ]
        for one in started:
            if one.wait():
                raise subprocess.CalledProcessError(one.returncode, one.args)
        return [json.loads(output.read_text(encoding="utf-8")) for output in outputs]


def worker(store: str, rank: int, ranks: int, output: str) -> None:
    """Take the steps as one of the ranks, and write its figures."""
    with joined(store, rank, ranks):
        collective = Replicas(lambda batch: len(batch["y"])) if ranks > 1 else ALONE
        Path(output).write_text(json.dumps(steps(rank, ranks, collective)), encoding="utf-8")


def measured(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return the figures of a step for each number of ranks.

    ``sent_bytes`` is what a rank hands over, ``ring_bytes`` what a rank sends if every sum is a
    ring all-reduce, 2 (R − 1) / R of it (derived).

    Raises:
        subprocess.CalledProcessError: A rank failed.
    """
    found = []
    for ranks in sizes:
        ran = of_ranks("recipes.evidence.growth.ranks", ranks)
        sent = max(one["bytes"] for one in ran)
        found.append(
            {
                "size": ranks,
                "cpu_ms": round(sum(one["cpu_ms"] for one in ran), 2),
                "cpu_ms_of_a_rank": round(max(one["cpu_ms"] for one in ran), 2),
                "sent_bytes": round(sent),
                "ring_bytes": round(2 * (ranks - 1) / ranks * sent),
                "theta_bytes": ran[0]["theta_bytes"],
                "phi_bytes": ran[0]["phi_bytes"],
                "bytes_by_call": ran[0]["bytes_by_call"],
            }
        )
    return found


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
