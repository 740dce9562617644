"""Time and memory of an iteration: ``python -m recipes.evidence.bench race``.

The original's step, the step in place by ``Dot`` and by ``Ghost``, and the floor take turns on one
random InternVL with the real vocabulary: same weights, precision, data and thread. Times are
processor seconds, medians over rounds; memory is the allocator's own record. ``--full`` instead
takes one iteration of the whole InternVL3-1B in bfloat16, and tells its peak resident memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.evidence.bench.measure import (
    Timed,
    in_rounds,
    keep_freed_memory,
    median_of,
    with_peak,
)
from recipes.evidence.bench.race.contenders import (
    DOT,
    FLOOR,
    GHOST,
    ORIGINAL,
    Contender,
    contenders,
    forward,
    with_graph,
)
from recipes.evidence.bench.race.model import SHAPES, Race, make_race
from recipes.run.files import write_json
from recipes.run.provenance import environment, machine

ROUTES = (FLOOR, ORIGINAL, DOT, GHOST)
_FORWARD = "forward"


def measure(race: Race, rounds: int, batch_size: int) -> list[dict[str, Any]]:
    """Return a row for every contender.

    ``overhead_vs_floor`` and ``times_faster_than_original`` are per example, medians of ratios
    within a round. ``peak_saved_bytes`` is what an iteration holds beyond θ and its moments,
    ``peak_bytes`` all of it; ``copies`` is that without the activations of a forward pass, in
    copies of θ.
    """
    found = contenders(race, batch_size)
    peaks = {}
    for one in found:
        one.run()  # Rules per example are verified at the first step.
        peaks[one.route] = with_peak(one.run)[1]
    activations = {size: with_peak(with_graph(race, size))[1] for size in (1, batch_size)}
    timed = {one.route: Timed(one.run) for one in found} | {_FORWARD: Timed(forward(race))}
    seconds = in_rounds(timed, rounds, lambda line: print(line, file=sys.stderr), time.process_time)
    return [_row(race, one, peaks, activations[one.examples], seconds) for one in found]


def _row(
    race: Race,
    one: Contender,
    peaks: Mapping[str, int],
    activations: int,
    seconds: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    route, size = one.route, one.examples
    peak = race.held_bytes + peaks[route]
    params = race.params.values()

    def median(value: Callable[[Mapping[str, float]], float]) -> float:
        return float(f"{median_of(seconds, value):.4g}")

    return {
        "route": route,
        "model": f"InternVL, {race.shape.name}, {sum(leaf.numel() for leaf in params) / 1e6:.0f} M "
        f"parameters, batch {size} x {race.shape.tokens} tokens",
        "dtype": str(next(iter(params)).dtype).removeprefix("torch."),
        "forwards": median(lambda at: at[route] / at[_FORWARD]),
        "overhead_vs_floor": median(lambda at: at[route] / size / at[FLOOR]),
        "peak_saved_bytes": peaks[route],
        "rel_error": None,
        "unroll_steps": 1,
        "times_faster_than_original": median(lambda at: at[ORIGINAL] * size / at[route]),
        "cpu_seconds": median(lambda at: at[route]),
        "peak_bytes": peak,
        "peak_over_original": float(f"{peak / (race.held_bytes + peaks[ORIGINAL]):.3g}"),
        "copies": float(f"{(peak - activations) / race.parameter_bytes:.3g}"),
    }


def full_iteration() -> dict[str, Any]:
    """Take iterations of the whole model in bfloat16 by ``Dot`` in place."""
    race = make_race(SHAPES["full"], torch.bfloat16)
    one = next(one for one in contenders(race, 1) if one.route == DOT)
    gc.collect()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # Forget the peak of building the model.
    started = time.process_time()
    found = one.run()
    seconds = time.process_time() - started
    assert found is not None
    return {
        "model": race.shape.name,
        "parameters": sum(leaf.numel() for leaf in race.params.values()),
        "dtype": "bfloat16",
        "cpu_seconds": round(seconds, 1),
        "peak_resident_bytes": _peak_resident(),
        "hypergradient_entries": int((found != 0.0).sum()),
    }


def _peak_resident() -> int | None:
    """Return the peak resident memory of this process in bytes, None on a system without it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = status.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as text."""
    lines = [
        rows[0]["model"].rpartition(", batch")[0] + f", {rows[0]['dtype']}",
        f"{'route':<18}{'examples':>9}{'cpu s':>8}{'x floor':>9}{'x faster':>10}{'peak GB':>9}"
        f"{'x original':>12}{'copies':>8}",
    ]
    for row in rows:
        size = row["model"].rpartition("batch ")[2].partition(" ")[0]
        lines.append(
            f"{row['route']:<18}{size:>9}{row['cpu_seconds']:>8.2f}"
            f"{row['overhead_vs_floor']:>9.3f}{row['times_faster_than_original']:>10.2f}"
            f"{row['peak_bytes'] / 1e9:>9.2f}{row['peak_over_original']:>12.2f}"
            f"{row['copies']:>8.2f}"
        )
    return "\n".join(lines)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put the rows into the results of ``core``, in the place of earlier ones of this race.

    A race on another model keeps its rows.
    """
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    ours = {(row["route"], row["model"], row["dtype"]) for row in rows}
    kept = [row for row in kept if (row["route"], row["model"], row["dtype"]) not in ours]
    write_json(path, [*kept, *rows])


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table and, with ``--output``, write the rows."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.bench race",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--size", choices=["quarter", "published"], default="quarter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="of ghost, both levels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="the whole model, one iteration")
    parser.add_argument("--output", help="JSON of all rows, e.g. results/bench.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    about = {
        "machine": machine(),
        "command": " ".join(["python -m recipes.evidence.bench race", *arguments]),
    }
    if given.full:
        found = full_iteration()
        print(json.dumps(found, indent=1))
        if given.output:
            write_json(Path(given.output), found | about | {"environment": environment()})
        return
    keep_freed_memory()
    rows = measure(make_race(SHAPES[given.size], torch.float32), given.rounds, given.batch_size)
    print(table(rows))
    if given.output:
        write_rows(Path(given.output), [row | about for row in rows])
