"""The rows as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.evidence.gpu import case as names
from recipes.evidence.gpu.answer import MEASURED
from recipes.evidence.gpu.meter import GB, Counts
from recipes.evidence.gpu.targets import Row

_SHORT = {MEASURED: "fits", "out of memory": "no", "not measured": "-"}
_CELL = ("precision", "tiles", "positions")
_SAME = (*_CELL, "contender", "examples")


def table(results: Mapping[str, Any]) -> str:
    """Return steps, launches, agreement and targets of a run as text."""
    rows: Sequence[Row] = results["rows"]
    caps = sorted({row["cap"] for row in rows if row["cap"] is not None}, reverse=True)
    head = (
        f"{'contender':<20}{'precision':<11}{'tiles':>5}{'pos.':>5}{'ex.':>4}{'s':>9}{'x floor':>9}"
        f"{'x faster':>9}{'GB':>8}{'reserved':>9}"
    )
    lines = [head + "".join(f"{f'{cap:g} GB':>10}" for cap in caps)]
    lines += [_step(row, rows, caps) for row in rows if row["measure"] == "step"]
    lines += ["", f"{'contender':<20}" + "".join(f"{name:>10}" for name in Counts._fields)]
    for row in rows:
        if row["measure"] == "launches":
            figures = "".join(f"{row.get(name, '-'):>10}" for name in Counts._fields)
            lines.append(f"{row['contender']:<20}{figures}{_why(row)}")
    lines += ["", f"{'beside float32':<20}{'precision':<11}{'cosine':>10}{'equal signs':>13}"]
    for one in results["agreement"]:
        cosine = "-" if one["cosine"] is None else f"{one['cosine']:.6f}"
        lines.append(
            f"{one['contender']:<20}{one['precision']:<11}{cosine:>10}{one['sign_agreement']:>13.2f}"
        )
    lines += ["", f"{'target':<36}{'bound':>8}{'found':>12}"]
    for one in results["targets"]:
        found = "-" if one["found"] is None else f"{one['found']:.4g}"
        why = f": {one['why_not']}" if one["why_not"] else ""
        lines.append(f"{one['target']:<36}{one['bound']:>8}{found:>12}  {one['verdict']}{why}")
    return "\n".join([*lines, *_left_out(rows)])


def _step(row: Row, rows: Sequence[Row], caps: Sequence[float]) -> str:
    line = (
        f"{row['contender']:<20}{row['precision']:<11}{row['tiles']:>5}{row['positions']:>5}"
        f"{row['examples']:>4}"
    )
    if row["status"] == MEASURED:
        own = row["seconds"] / row["examples"]
        floor, original = (_seconds(rows, row, one) for one in (names.FLOOR, names.ORIGINAL))
        reserved = row["peak_reserved"]
        line += (
            f"{row['seconds']:>9.4f}{'-' if floor is None else format(own / floor, '.3f'):>9}"
            f"{'-' if original is None else format(original / own, '.2f'):>9}"
            f"{row['peak_allocated'] / GB:>8.2f}"
            f"{'-' if reserved is None else format(reserved / GB, '.2f'):>9}"
        )
    else:
        line += f"{row['status']:>44}"
    for cap in caps:
        capped = (
            other
            for other in rows
            if other["cap"] == cap and all(other[name] == row[name] for name in _SAME)
        )
        status = next((other["status"] for other in capped), "not measured")
        line += f"{_SHORT.get(status, status):>10}"
    return line + _why(row)


def _seconds(rows: Sequence[Row], row: Row, contender: str) -> float | None:
    """Return the seconds per example of a contender at the cell of a row."""
    for other in rows:
        if other["contender"] == contender and all(other[name] == row[name] for name in _CELL):
            found = other.get("seconds")
            if found is not None:
                return float(found) / int(other["examples"])
    return None


def _why(row: Row) -> str:
    reason = row.get("error") or row.get("reason")
    return f"  {row['status']}: {reason}" if reason else ""


def _left_out(rows: Sequence[Row]) -> list[str]:
    """Return how many rows of memory and agreement have no figure, and why."""
    found = [
        f"{row['measure']}{_why(row) or '  cut'}"
        for row in rows
        if row["measure"] in ("cap", "agreement") and (_why(row) or row["status"] == "cut")
    ]
    counts = {line: found.count(line) for line in dict.fromkeys(found)}
    return ["", *(f"{many} x {line}" for line, many in counts.items())] if counts else []
