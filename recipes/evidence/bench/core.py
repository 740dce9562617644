"""Cost of hypergradients on a small decoder: ``make bench``, ``python -m recipes.evidence.bench``.

Everything is timed in one process, in rounds with one call of each, so that variations in the
machine's speed affect all alike. Long windows run in some of the rounds only. Every ratio is taken
within a round, and the median over the rounds is reported. Peak memory, arithmetic and the error
come from one further evaluation outside the timing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from recipes.evidence.bench import report
from recipes.evidence.bench.case import Case, make_case
from recipes.evidence.bench.contenders import (
    FLOOR,
    FORWARD,
    LOWER,
    TORCHOPT,
    baselines,
    contenders,
    long_contenders,
)
from recipes.evidence.bench.decoder import Sizes
from recipes.evidence.bench.evaluate import Evaluated, errors, evaluate
from recipes.evidence.bench.measure import (
    Timed,
    in_rounds,
    keep_freed_memory,
    median_of,
    with_flops,
)
from recipes.run.files import check_writable, write_json
from recipes.run.provenance import environment, machine

WINDOWS = [1, 4, 16, 64]


@dataclass(frozen=True)
class Plan:
    """The measurements and their number.

    Attributes:
        sizes: The sizes of the model and the batches.
        windows: The numbers of lower steps of the unrolls.
        rounds: The number of rounds of the timing; see ``Contender.every``.
        cap: The limit of the resident memory of TorchOpt's process in bytes.
        reference_steps: The longest window that is also computed in float64.
    """

    sizes: Sizes
    windows: Sequence[int]
    rounds: int
    cap: int
    reference_steps: int


def measure(plan: Plan, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure everything.

    Args:
        plan: The measurements.
        log: The function that gets lines about the progress.

    Returns:
        The content of ``results/bench.json`` and ``results/bench_details.json``, except the command
        and the machine.
    """
    case = make_case(plan.sizes, max(plan.windows, default=1))
    long = make_case(longer(plan.sizes), 1)
    cases = [case, case.cast(torch.bfloat16), long]
    rows_of = [contenders(at, plan.windows, plan.cap) for at in cases[:2]]
    rows_of.append(long_contenders(long))
    evaluated: list[Evaluated] = []
    for contender in chain.from_iterable(rows_of):
        started = time.perf_counter()
        evaluated.append(evaluate(contender))
        log(f"{evaluated[-1].name}: evaluated in {time.perf_counter() - started:.1f} s")
    distances, cosines = errors(evaluated, plan.reference_steps, log)
    units = {(at.name, name): run for at in cases for name, run in baselines(at).items()}
    timed = {_unit(*unit): Timed(run) for unit, run in units.items()}
    for one in evaluated:
        if one.peak is not None:
            timed[one.name] = Timed(one.contender.run, one.contender.every)
    seconds = in_rounds(timed, plan.rounds, log)
    unit_flops = {unit: with_flops(run)[1] for unit, run in units.items()}
    rows, details = [], []
    for one in evaluated:
        times = None if one.peak is None else _times(one, seconds)
        rows.append(_row(one, times, distances.get(one.name)))
        details.append(
            {
                "route": one.contender.route,
                "unroll_steps": one.contender.steps,
                "dtype": rows[-1]["dtype"],
                "batch": one.contender.case.batch,
                "seconds": None if times is None else _digits(times["seconds"], 4),
                "forwards_by_flops": None
                if one.flops is None
                else _digits(one.flops / unit_flops[one.contender.case.name, FORWARD], 4),
                "extra_forwards": None if times is None else _digits(times["extra"], 3),
                "over_torchopt": None if times is None else _digits(times.get("over"), 3),
                "cosine_to_exact": _digits(cosines.get(one.name), 6),
                "notes": "; ".join(one.notes),
            }
        )
    return {
        "rounds": plan.rounds,
        "model": {
            "description": "decoder: RMSNorm, rotary attention, gated SiLU; random weights after "
            f"{int(case.state.steps)} AdamW steps",
            "sizes": asdict(plan.sizes),
            "parameters": sum(leaf.numel() for leaf in case.lower.values()),
            "parameter_bytes": case.parameter_bytes,
            "parameter_and_optimizer_bytes": case.state_bytes,
        },
        "floor": {
            at.name: {
                "milliseconds": _digits(1e3 * _median(seconds, at, FLOOR), 4),
                "lower_step_milliseconds": _digits(1e3 * _median(seconds, at, LOWER), 4),
                "forward_milliseconds": _digits(1e3 * _median(seconds, at, FORWARD), 4),
            }
            for at in cases
        },
        "memory_cap_bytes": plan.cap,
        "definitions": report.DEFINITIONS,
        "rows": rows,
        "details": details,
        "targets": report.targets(rows, details, case.state_bytes),
    }


def longer(sizes: Sizes) -> Sizes:
    """Return sizes with half as many sequences, of four times the length."""
    return replace(sizes, examples=max(sizes.examples // 2, 1), tokens=4 * sizes.tokens)


def _unit(case: str, name: str) -> str:
    return f"{name}, {case}"


def _key(case: Case, name: str) -> str:
    return f"{name}, 1, {case.name}" if name.startswith("floor") else _unit(case.name, name)


def _median(seconds: Sequence[dict[str, float]], case: Case, name: str) -> float:
    return median_of(seconds, lambda one: one[_key(case, name)])


def _times(one: Evaluated, seconds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return medians over the rounds of seconds, and of ratios within a round."""
    at, steps = one.contender.case, one.contender.steps
    lower, forward = _key(at, LOWER), _key(at, FORWARD)
    floor = _key(at, one.contender.floor)
    theirs = f"{TORCHOPT}, {steps}, {at.name}"

    def least(timing: Mapping[str, float]) -> float:
        return timing[floor] + (steps - 1) * timing[lower]

    times = {
        "seconds": median_of(seconds, lambda timing: timing[one.name]),
        "forwards": median_of(seconds, lambda timing: timing[one.name] / timing[forward]),
        "overhead": median_of(seconds, lambda timing: timing[one.name] / least(timing)),
        "extra": median_of(
            seconds, lambda timing: (timing[one.name] - least(timing)) / timing[forward]
        ),
    }
    if one.contender.route.startswith("unrolled") and theirs in seconds[0]:
        times["over"] = median_of(seconds, lambda timing: timing[one.name] / timing[theirs])
    return times


def _row(one: Evaluated, times: dict[str, float] | None, error: float | None) -> dict[str, Any]:
    contender = one.contender
    refused = [note for note in one.notes if note.startswith(("refused", "out of memory"))]
    return {
        "route": contender.route + (f" ({refused[0]})" if refused else ""),
        "model": _model_name(contender.case),
        "dtype": str(contender.case.dtype).removeprefix("torch."),
        "forwards": None if times is None else _digits(times["forwards"], 4),
        "overhead_vs_floor": None if times is None else _digits(times["overhead"], 4),
        "peak_saved_bytes": one.peak,
        "rel_error": _digits(error, 2),
        "unroll_steps": contender.steps,
    }


def _model_name(case: Case) -> str:
    millions = sum(leaf.numel() for leaf in case.lower.values()) / 1e6
    return f"decoder, {millions:.1f} M parameters, batch {case.batch} tokens"


def _digits(value: float | None, digits: int) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table and, with ``--output``, write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.bench", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, help="of the timing; 5, or 2 with --quick")
    parser.add_argument("--windows", type=int, nargs="*", help="1 4 16 64, or 1 4 with --quick")
    parser.add_argument(
        "--reference-steps", type=int, default=16, help="longest window computed in float64"
    )
    parser.add_argument("--examples", type=int, default=Sizes.examples, help="sequences in a batch")
    parser.add_argument("--tokens", type=int, default=Sizes.tokens, help="of each sequence")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, short windows")
    parser.add_argument("--threads", type=int, default=0, help="0: what torch chooses")
    parser.add_argument("--memory-cap-gb", type=float, default=6.0, help="for TorchOpt's process")
    parser.add_argument(
        "--output",
        help="JSON of the rows, e.g. results/bench.json; beside it the rest, in *_details.json",
    )
    given = parser.parse_args(arguments)
    if given.output:
        check_writable("--output", Path(given.output))
    rounds = given.rounds or (2 if given.quick else 5)
    windows = given.windows if given.windows is not None else ([1, 4] if given.quick else WINDOWS)
    if given.threads:
        torch.set_num_threads(given.threads)
    kept = keep_freed_memory()
    started = time.perf_counter()
    cap = round(given.memory_cap_gb * 2**30)
    sizes = Sizes(examples=given.examples, tokens=given.tokens)
    plan = Plan(sizes, windows, rounds, cap, given.reference_steps)
    measured = measure(plan, lambda line: print(line, file=sys.stderr))
    print(report.table(measured))
    machine_facts = machine()
    seconds = round(time.perf_counter() - started)
    print(f"{seconds} s in all, {machine_facts}")
    if given.output:
        path = Path(given.output)
        rows = measured.pop("rows")
        write_json(path, [row | {"machine": machine_facts} for row in rows])
        about = {
            "command": " ".join(["python -m recipes.evidence.bench", *arguments]),
            "environment": environment(),
            "seconds": seconds,
            "freed_memory_kept": kept,
        }
        write_json(path.with_stem(f"{path.stem}_details"), about | measured)
