"""Exponents of growth: ``python -m recipes.evidence.growth [AXIS ...]``; all but accuracy, if none.

Each axis is measured over a range of sizes and fitted, ``figure = factor · size ** exponent``. The
results of the axes that are measured take the place of those in the output file; the others stay.
Times are processor seconds on one thread, medians over rounds in which all sizes take turns. Bytes
are the allocator's record, sizes of files, or what is handed to the collectives.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.evidence.growth import (
    accuracy,
    candidates,
    plan,
    ranks,
    shards,
    steps,
    tables,
    upper_gradient,
)
from recipes.evidence.growth.fit import fitted
from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json
from recipes.run.provenance import environment, machine

_TIMES = ("step_ms", "judge_ms", "checkpoint_ms")
_BYTES = ("state_bytes", "step_bytes", "checkpoint_bytes")
Measure = Callable[[argparse.Namespace], dict[str, Any]]


def _steps(axis: str) -> Measure:
    def measure(given: argparse.Namespace) -> dict[str, Any]:
        rows = steps.measured(axis, given.sizes or steps.SIZES[axis], given.rounds)
        return fitted(axis, rows, ("cpu_ms", "peak_bytes"))

    return measure


def _table(optimizer: str) -> Measure:
    def measure(given: argparse.Namespace) -> dict[str, Any]:
        rows = tables.measured(optimizer, given.sizes or tables.SIZES, given.rounds)
        return fitted(f"table, {optimizer}", rows, (*_TIMES, *_BYTES))

    return measure


def _rows(given: argparse.Namespace) -> dict[str, Any]:
    """Fit what ``recipes.evidence.bench_growth`` has measured."""
    measured = json.loads(Path(given.rows_file).read_text(encoding="utf-8"))["rows"]
    rows = [
        {"size": row["rows"], "cpu_ms": 1000 * row["cpu_seconds"], **row}
        for row in measured
        if row["command"] == "train"
    ]
    return fitted("rows", rows, ("cpu_ms", "bytes_beyond_model", "file_bytes"))


def _ranks(given: argparse.Namespace) -> dict[str, Any]:
    rows = ranks.measured(given.sizes or ranks.SIZES)
    return fitted("ranks", rows, ("cpu_ms", "cpu_ms_of_a_rank", "sent_bytes", "ring_bytes"))


def _shards(given: argparse.Namespace) -> dict[str, Any]:
    return {"axis": "shards", "rows": shards.measured(given.sizes or shards.SIZES)}


def _candidates(given: argparse.Namespace) -> dict[str, Any]:
    rows = candidates.measured(given.sizes or candidates.SIZES)
    return fitted("candidates", rows, ("cpu_ms", "peak_bytes", "bytes_beyond_start"))


def _upper_gradient(given: argparse.Namespace) -> dict[str, Any]:
    every = given.sizes or upper_gradient.EVERY
    rows = upper_gradient.measured(every, given.rounds, given.batch_size)
    return {"axis": "upper-gradient", "batch_size": given.batch_size, "rows": rows}


def _accuracy(given: argparse.Namespace) -> dict[str, Any]:
    every = given.sizes or upper_gradient.EVERY
    rows = accuracy.measured(Path(given.work_dir), every, given.seeds)
    return {"axis": "accuracy", "seeds": given.seeds, "rows": rows}


def _digits(given: argparse.Namespace) -> dict[str, Any]:
    rows = accuracy.digits(given.sizes or upper_gradient.EVERY, given.seeds)
    return {"axis": "digits", "seeds": given.seeds, "rows": rows}


AXES: Mapping[str, Measure] = {
    **{axis: _steps(axis) for axis in steps.SIZES},
    **{f"table-{name}": _table(name) for name in tables.UPPER},
    "rows": _rows,
    "ranks": _ranks,
    "shards": _shards,
    "candidates": _candidates,
    "upper-gradient": _upper_gradient,
    "digits": _digits,
    "accuracy": _accuracy,
    "plan": lambda _: {"axis": "plan", "derived": True, "rows": plan.table()},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the axes, print their figures and fits, and store them."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.growth", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("axes", nargs="*", choices=[*AXES, []], metavar="AXIS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="*", help="in place of those of the axis")
    parser.add_argument("--batch-size", type=int, default=32, help="of upper-gradient")
    parser.add_argument("--seeds", type=int, default=3, help="of accuracy and digits")
    parser.add_argument("--work-dir", default="runs/growth", help="of accuracy, for its runs")
    parser.add_argument("--rows-file", default="results/bench_growth.json", help="for rows")
    parser.add_argument("--output", default="results/growth.json")
    given = parser.parse_args(arguments)
    output = Path(given.output)
    check_writable("--output", output)
    torch.set_num_threads(1)
    words = sys.argv[1:] if arguments is None else arguments
    for axis in given.axes or [axis for axis in AXES if axis != "accuracy"]:
        found = AXES[axis](given)
        for row in found["rows"]:
            print(f"{axis}: {json.dumps({k: v for k, v in row.items() if k != 'runs'})}")
        for quantity, fit in found.get("fits", {}).items():
            print(f"{axis}: {quantity} {json.dumps(fit)}")
        kept = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
        found["command"] = " ".join(["python -m recipes.evidence.growth", *words])
        found |= {"machine": machine(), "environment": environment()}
        write_json(output, kept | {axis: found})


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.growth", main))
