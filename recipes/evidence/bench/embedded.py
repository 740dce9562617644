"""Cost of a bilevel iteration on the embedded model, route by route.

``python -m recipes.evidence.bench embedded``.

The floor is the unavoidable cost: one ordinary lower step and one upper gradient. All are timed in
rounds in one process, so that variations in the machine's speed affect all alike. The report has
medians and ratios to the floor of the same round, the relative error of the hypergradient against
the exact one (forward mode in float64), and the growth of peak memory over the loaded model,
measured in a process of its own per route.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import SGD, BilevelSolver, Ghost, Jvp, OneStep, PerExample, Reverse
from bilevel.hypergradients.one_step import Order
from bilevel.routes import CentralDifference, Route
from prm.aggregations import AGGREGATIONS
from prm.inputs.collate import Batch
from recipes.embedded.build import Sizes, build
from recipes.evidence.bench.measure import keep_freed_memory
from recipes.method.make_solver import lower_optimizer
from recipes.method.objective import Objective, Solver, State
from recipes.models.loading import load_model
from recipes.options.parse import changed, resolve
from recipes.options.train import TrainOptions
from recipes.run.files import check_writable, write_json
from recipes.run.provenance import environment
from recipes.train.data import read_train_data
from weighting import InstanceTable

_WARM_UP = 3
_ROUTES: dict[str, tuple[Route, Order]] = {
    "ghost, upper-first": (Ghost(), "upper-first"),
    "per-example, lower-first": (PerExample(), "lower-first"),
    "jvp, lower-first": (Jvp(), "lower-first"),
    "jvp, upper-first": (Jvp(), "upper-first"),
    "central difference, lower-first": (CentralDifference(), "lower-first"),
    "reverse, lower-first": (Reverse(), "lower-first"),
}


@dataclass(frozen=True)
class Setup:
    """The embedded model with one lower and one upper batch."""

    objective: Objective
    optimizer: Any
    lower: dict[str, Tensor]
    upper: dict[str, Tensor]
    lower_batch: Batch
    upper_batch: Batch

    def solver(self, route: Route, order: Order) -> Solver:
        """Return a solver with this route and an upper step at every lower step."""
        return BilevelSolver(
            self.objective.problem(), self.optimizer, SGD(1.0), OneStep(route, order)
        )

    def double(self) -> Setup:
        """Return the same setup in float64."""
        model = self.objective.prm.model.double()
        prm = replace(self.objective.prm, model=model)
        return replace(
            self,
            objective=replace(self.objective, prm=prm),
            lower={name: tensor.double() for name, tensor in self.lower.items()},
            upper={name: tensor.double() for name, tensor in self.upper.items()},
            lower_batch=_double(self.lower_batch),
            upper_batch=_double(self.upper_batch),
        )


def _double(batch: Batch) -> Batch:
    return {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}


def make_setup(batch_size: int, meta_batch_size: int) -> Setup:
    """Return the embedded model and data, an Instance Table, and AdamW after a few steps."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        build(data_dir, sizes=Sizes(40, 3, 1, 40, 4, 2, 2))
        preset = changed(
            resolve(TrainOptions, {"config": "train-table"}),
            train_file=str(data_dir / "train.jsonl"),
            meta_file=str(data_dir / "meta.jsonl"),
            dev_file=None,
            test_file=None,
        )
        torch.manual_seed(0)
        prm, lower = load_model(preset, preset.lower.freeze)
        data = read_train_data(prm, preset)
        assert data.meta is not None
        lower_batch = data.train.batch(range(batch_size))
        upper_batch = data.meta.batch(range(meta_batch_size))
    upper_batch["group"] = torch.arange(meta_batch_size) // 4
    table = InstanceTable(len(data.train), normalise="none")
    objective = Objective(
        prm, AGGREGATIONS[preset.aggregation], preset.loss_target, table, (), False
    )
    upper = table.init()
    optimizer = replace(lower_optimizer(preset), lr=1e-4)
    setup = Setup(objective, optimizer, lower, upper, lower_batch, upper_batch)
    return setup


def warm_state(setup: Setup, solver: Solver) -> State:
    """Return a state whose Adam moments are not cold."""
    state = solver.init(setup.lower, setup.upper)
    for _ in range(_WARM_UP):
        state, _ = solver.step(state, [setup.lower_batch])
    return state


def hypergradient(setup: Setup, route: Route, order: Order) -> Tensor:
    """Return the hypergradient at the warm state, from an SGD step of rate 1 on the table."""
    solver = setup.solver(route, order)
    state = warm_state(setup, solver)
    stepped, _ = solver.step(state, [setup.lower_batch], setup.upper_batch)
    return state.upper_params["deviation"] - stepped.upper_params["deviation"]


def parts(setup: Setup) -> dict[str, Callable[[], Any]]:
    """Return the timed functions: the two parts of the floor, and an iteration by every route."""
    plain = setup.solver(Jvp(), "lower-first")
    state = warm_state(setup, plain)

    def upper_gradient() -> Any:
        lower = {name: t.detach().requires_grad_() for name, t in state.lower_params.items()}
        loss = setup.objective.upper_loss(lower, state.upper_params, setup.upper_batch)
        return torch.autograd.grad(loss, list(lower.values()))

    timed: dict[str, Callable[[], Any]] = {
        "lower step": lambda: plain.step(state, [setup.lower_batch]),
        "upper gradient": upper_gradient,
    }
    for name, (route, order) in _ROUTES.items():
        solver = setup.solver(route, order)
        timed[name] = partial(solver.step, state, [setup.lower_batch], setup.upper_batch)
    return timed


def peak_memory(name: str, batch_size: int, meta_batch_size: int) -> float:
    """Return the growth of peak resident memory in MB during ``name`` (Linux).

    It is measured in a new process whose allocator returns freed memory at once.
    """
    command = [sys.executable, "-m", "recipes.evidence.bench", "embedded", "--one", name]
    command += ["--batch-size", str(batch_size), "--meta-batch-size", str(meta_batch_size)]
    frugal = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    finished = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **frugal}
    )
    return float(finished.stdout.split()[-1])


def _status_kb(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def main(given: Sequence[str]) -> None:
    """Measure, print and write ``results/bench_embedded.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.bench embedded",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--meta-batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", default="results/bench_embedded.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    check_writable("--output", Path(arguments.output))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = (arguments.batch_size, arguments.meta_batch_size)
    setup = make_setup(*sizes)
    timed = parts(setup)
    if arguments.one:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # This resets the peak that is read below.
        before = _status_kb("VmRSS")
        timed[arguments.one]()
        print((_status_kb("VmHWM") - before) / 1024)
        return
    keep_freed_memory()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_number in range(arguments.rounds + 2):
        for name, run in timed.items():
            started = time.perf_counter()
            run()
            if round_number >= 2:  # The first rounds warm the caches.
                seconds[name].append(time.perf_counter() - started)
    floors = [a + b for a, b in zip(seconds["lower step"], seconds["upper gradient"], strict=True)]
    gradients = {name: hypergradient(setup, *choice) for name, choice in _ROUTES.items()}
    exact = setup.double()
    references = {
        order: hypergradient(exact, Jvp(), order) for order in ("lower-first", "upper-first")
    }
    rows = []
    for name in timed:
        row: dict[str, Any] = {
            "route": name,
            "milliseconds": round(1000 * statistics.median(seconds[name]), 1),
        }
        if name in _ROUTES:
            ratios = [t / floor for t, floor in zip(seconds[name], floors, strict=True)]
            reference = references[_ROUTES[name][1]]
            error = (gradients[name].double() - reference).norm() / reference.norm()
            row |= {
                "overhead_vs_floor": round(statistics.median(ratios), 3),
                "rel_error": float(f"{float(error):.2g}"),
            }
        row["peak_memory_mb"] = round(peak_memory(name, *sizes), 1)
        rows.append(row)
    floor = 1000 * statistics.median(floors)
    print(f"floor: lower step + upper gradient = {floor:.0f} ms, batch {sizes[0]} + {sizes[1]}")
    print(f"{'':<34}{'ms':>8}{'x floor':>9}{'rel. error':>12}{'peak MB':>9}")
    for row in rows:
        print(
            f"{row['route']:<34}{row['milliseconds']:>8.0f}"
            f"{row.get('overhead_vs_floor', float('nan')):>9.2f}"
            f"{row.get('rel_error', float('nan')):>12.1e}{row['peak_memory_mb']:>9.0f}"
        )
    report = {
        "command": " ".join(["python -m recipes.evidence.bench embedded", *given]),
        "machine": platform.processor() or platform.machine(),
        "environment": environment(),
        "rounds": arguments.rounds,
        "batch_size": sizes[0],
        "meta_batch_size": sizes[1],
        "floor_milliseconds": round(floor, 1),
        "rows": rows,
    }
    write_json(Path(arguments.output), json.loads(json.dumps(report)))
