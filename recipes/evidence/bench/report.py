"""The table of ``core``, the meaning of its columns, the targets, and the file of all rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.evidence.bench.contenders import FLOOR, TORCHOPT

DEFINITIONS = {
    "forwards": "time of a whole iteration (unroll_steps lower steps, an upper gradient, and what "
    "the route adds), in units of one forward pass of a lower batch without gradients; median "
    "over the rounds of the ratio within a round",
    "overhead_vs_floor": "the same time over that of unroll_steps plain lower steps and one plain "
    "upper gradient, with the same optimizer and no hypergradient: 1 is what nobody can avoid. "
    "For dot the plain step goes through one example at a time too",
    "peak_saved_bytes": "most bytes of tensors alive at once during an iteration, beyond what was "
    "there before it (parameters, optimizer state, batches), as torch's CPU allocator reports to "
    "its profiler: saved activations, kept trees, the new parameters and state, temporaries",
    "rel_error": "Euclidean, against the float64 value of what the row sets out to compute at the "
    "same parameters: the derivative through the lower step (lower-first), its prediction before "
    "the step (upper-first), Betty's convention, or the derivative through unroll_steps steps; for "
    "the floor that of the plain upper gradient, which no hypergradient made of it can do without",
    "details": "one per row, in the same order. batch: sequences x tokens. seconds: of an "
    "iteration. forwards_by_flops: matrix-product operations over those of a forward pass. "
    "extra_forwards: time beyond the floor's, in forward passes. over_torchopt: time over that of "
    "TorchOpt's double backward through as many steps, within a round. cosine_to_exact: with the "
    "derivative through the lower steps, in float64, whatever the row sets out to compute",
    "freed_memory_kept": "whether the C library was told not to return freed memory to the system, "
    "which else costs some routes up to a third of a forward pass in page faults",
    "targets": "found: the figure, by time where it is a cost; counted: the same by matrix-product "
    "operations",
}
EXACT = ("dot", "ghost", "per-example", "jvp", "reverse")


def merged(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return these rows, and those of other models that are in a file of results already."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    models = {_model(row) for row in rows}
    return [*(row for row in kept if _model(row) not in models), *rows]


def _model(row: Mapping[str, Any]) -> str:
    """Return the model of a row, without the batch."""
    model: str = row["model"]
    return model.rpartition(", batch")[0]


def table(measured: Mapping[str, Any]) -> str:
    """Return the rows, the floors and the targets as text."""
    lines = []
    for dtype, floor in measured["floor"].items():
        lines.append(
            f"{dtype}: floor {floor['milliseconds']:g} ms, of it lower step "
            f"{floor['lower_step_milliseconds']:g} ms; forward pass "
            f"{floor['forward_milliseconds']:g} ms"
        )
    model = measured["model"]
    lines.append(
        f"{measured['rows'][0]['model'].partition(', batch')[0]}; parameters "
        f"{_mb(model['parameter_bytes'])} MB, with optimizer state "
        f"{_mb(model['parameter_and_optimizer_bytes'])} MB in float32; medians of "
        f"{measured['rounds']} rounds"
    )
    lines.append("")
    lines.append(
        f"{'route':<44}{'dtype':<10}{'batch':<10}{'K':>3}{'ms':>9}{'forwards':>10}{'(flops)':>9}"
        f"{'x floor':>9}{'peak MB':>9}{'rel error':>11}{'cosine':>9}"
    )
    for row, detail in zip(measured["rows"], measured["details"], strict=True):
        milliseconds = None if detail["seconds"] is None else 1e3 * detail["seconds"]
        peak = row["peak_saved_bytes"]
        lines.append(
            f"{detail['route']:<44}{row['dtype']:<10}{detail['batch']:<10}{row['unroll_steps']:>3}"
            f"{_cell(milliseconds, '.0f', 9)}{_cell(row['forwards'], '.1f', 10)}"
            f"{_cell(detail['forwards_by_flops'], '.1f', 9)}"
            f"{_cell(row['overhead_vs_floor'], '.3f', 9)}"
            f"{_cell(None if peak is None else peak / 1e6, '.0f', 9)}"
            f"{_cell(row['rel_error'], '.1e', 11)}{_cell(detail['cosine_to_exact'], '.4f', 9)}"
            f"{'  ' + detail['notes'] if detail['notes'] else ''}"
        )
    lines.append("")
    for target in measured["targets"]:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[target["met"]]
        found = "" if target["found"] is None else f" {target['found']:.3g}"
        counted = f"; by operations {target['counted']:.3g}" if "counted" in target else ""
        lines.append(f"{verdict:>13}: {target['target']}, found{found or ' nothing'}{counted}")
    return "\n".join(lines)


def targets(
    rows: Sequence[Mapping[str, Any]], details: Sequence[Mapping[str, Any]], state_bytes: int
) -> list[dict[str, Any]]:
    """Return the targets and the measured values.

    Times on a shared machine vary by more than the margin of some targets. Where arithmetic can be
    counted instead, its value is given beside that of the time, as ``counted``.

    Args:
        rows: The rows of the table.
        details: The details of the measurements.
        state_bytes: The size of parameters and optimizer state in bytes.
    """
    pairs = list(zip(rows, details, strict=True))
    batches = list(dict.fromkeys(detail["batch"] for detail in details))

    def figures(key: str, route: str, dtype: str, steps: int, batch: str | None) -> list[float]:
        values = []
        for row, detail in pairs:
            value = row.get(key, detail.get(key))
            here = row["dtype"] == dtype and row["unroll_steps"] == steps
            here = here and batch in (None, detail["batch"])
            if here and detail["route"].startswith(route) and value is not None:
                values.append(float(value))
        return values

    result = []
    for batch in batches:
        for route, most in (("dot, upper-first", 1.05), ("dot, lower-first", 1.05), ("ghost", 1.2)):
            values = figures("overhead_vs_floor", route, F32, 1, batch)
            result.append(_at_most(f"{route}, {batch}: at most {most} x floor", most, values))
        values = figures("extra_forwards", "jvp", F32, 1, batch)
        counted = [
            one - other
            for one, other in zip(
                figures("forwards_by_flops", "jvp", F32, 1, batch),
                figures("forwards_by_flops", FLOOR, F32, 1, batch),
                strict=True,
            )
        ]
        what = f"jvp, {batch}: at most 3.6 forward passes beyond the floor"
        result.append(_at_most(what, 3.6, values, counted))
    for dtype, most in ((F32, 1e-5), ("bfloat16", 0.02)):
        values = [error for route in EXACT for error in figures("rel_error", route, dtype, 1, None)]
        result.append(
            _at_most(f"errors of exact routes in {dtype}: at most {most:g}", most, values)
        )
    windows = sorted({row["unroll_steps"] for row in rows})
    for route in ("unrolled", "unrolled, replay sqrt"):
        peaks = [
            (row["unroll_steps"], row["peak_saved_bytes"])
            for row, detail in pairs
            if detail["route"] == route and row["peak_saved_bytes"] is not None
        ]
        growth = []
        if len(peaks) >= 2:
            (before, low), (after, high) = sorted(peaks)[-2:]
            growth = [(high - low) / (after - before) / state_bytes]
        what = f"{route}: peak grows per step by at most 1.25 x (parameters + optimizer state)"
        result.append(_at_most(what, 1.25, growth))
    for steps in windows:
        ratio = figures("over_torchopt", "unrolled", F32, steps, None)[:1]
        ours = figures("forwards_by_flops", "unrolled", F32, steps, None)[:1]
        theirs = figures("forwards_by_flops", TORCHOPT, F32, steps, None)
        counted = [one / other for one, other in zip(ours, theirs, strict=False)]
        what = f"unrolled({steps}): at most 1.3 x the time of TorchOpt's double backward"
        result.append(_at_most(what, 1.3, ratio, counted))
    return result


F32 = "float32"


def _at_most(
    target: str, most: float, values: Sequence[float], counted: Sequence[float] = ()
) -> dict[str, Any]:
    worst = max(values, default=None)
    return {
        "target": target,
        "at_most": most,
        "found": None if worst is None else float(f"{worst:.4g}"),
        "met": None if worst is None else worst <= most,
    } | ({"counted": float(f"{max(counted):.4g}")} if counted else {})


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f}"


def _cell(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"
