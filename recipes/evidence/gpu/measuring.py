"""Cases in turn, each within a limit, and what is known written after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.evidence.gpu.answer import FAILED, NOT_MEASURED
from recipes.evidence.gpu.case import Case
from recipes.evidence.gpu.worker import Ended, Worker

CUT = "cut"
LEAST = 2.0  # seconds; with less left no case is begun


@dataclass(frozen=True)
class Limits:
    """Limits in seconds.

    Attributes:
        budget: Of all of it.
        row: Of a case.
        start: Until a process is ready to measure.
    """

    budget: float
    row: float
    start: float


class NotReady(RuntimeError):
    """The measuring process did not start."""


def measure(
    cases: Sequence[Case],
    command: Sequence[str],
    limits: Limits,
    write: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Return a row for every case.

    A case that takes longer than its limit is cut: its process is ended, and another one goes on
    with the next. One that ends its process has failed. What the budget leaves no time for is not
    measured.

    Args:
        cases: The cases, in order.
        command: The command line of a measuring process.
        limits: The limits.
        write: Called with what the process says of the machine and with all rows so far, after
            each.

    Raises:
        NotReady: A process ended, or did not answer, before it was ready.
    """
    deadline = time.monotonic() + limits.budget
    rows: list[dict[str, Any]] = []

    def left() -> float:
        return deadline - time.monotonic()

    while len(rows) < len(cases) and left() > LEAST:
        with Worker(command) as worker:
            about = _about(worker, min(limits.start, left()))
            while len(rows) < len(cases) and left() > LEAST:
                one, limit = cases[len(rows)], min(limits.row, left())
                worker.ask(one)
                try:
                    found = worker.answer(limit)
                except Ended as error:
                    found = {"status": FAILED, "error": str(error)}
                    rows.append(one.as_row() | found)
                    write(about, rows)
                    break
                rows.append(one.as_row() | (found or {"status": CUT, "limit": round(limit, 1)}))
                write(about, rows)
                if found is None:
                    break
    if not rows:
        raise NotReady(f"the budget of {limits.budget:g} s has no time for a case; raise --budget")
    reason = {"status": NOT_MEASURED, "reason": f"the budget of {limits.budget:g} s was spent"}
    rows += [one.as_row() | reason for one in cases[len(rows) :]]
    write(about, rows)
    return rows


def _about(worker: Worker, limit: float) -> dict[str, Any]:
    try:
        about = worker.answer(limit)
    except Ended as error:
        raise NotReady(f"the measuring process ended before it was ready: {error}") from error
    if about is None:
        raise NotReady(f"the measuring process was not ready after {limit:.0f} s")
    return about
