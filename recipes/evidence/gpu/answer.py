"""The figures of a case."""

from __future__ import annotations

import gc
import math
from typing import Any

import torch

from recipes.evidence.bench.race.model import INSTANCES, Race
from recipes.evidence.gpu.case import Case
from recipes.evidence.gpu.meter import Meter
from recipes.evidence.gpu.subject import Start, differentiating, iteration, race_at

MEASURED, NO_MEMORY, FAILED, NOT_MEASURED = (
    "measured",
    "out of memory",
    "failed",
    "not measured",
)
COLD = 8  # iterations before the first counted hypergradient, which cold moments make almost 0


def answer(begun: Start, one: Case, meter: Meter, rounds: int, samples: int) -> dict[str, Any]:
    """Return the row of a case without its first fields: its status and what was measured.

    Memory that does not suffice is a result, and so is an error, by its message.

    Args:
        begun: The model.
        one: The case.
        meter: Of the model's device.
        rounds: Iterations that are timed.
        samples: Hypergradients of an "agreement".
    """
    gc.collect()  # What an earlier case left in cycles is not this one's memory.
    try:
        race = race_at(begun, one)
        if one.measure == "agreement":
            found = hypergradients(race, one, samples)
            if not all(map(math.isfinite, found)):
                return {"status": FAILED, "error": "a hypergradient is not finite"}
            return {"status": MEASURED, "hypergradients": found}
        if one.measure == "cap":
            return _fits(race, one, meter)
        return _after_two(race, one, meter, rounds)
    except torch.OutOfMemoryError:
        return {"status": NO_MEMORY}
    except Exception as error:  # of a kernel or a contender; the other rows go on
        lines = str(error).splitlines() or [""]
        return {"status": FAILED, "error": f"{type(error).__name__}: {lines[0]}"}


def _after_two(race: Race, one: Case, meter: Meter, rounds: int) -> dict[str, Any]:
    """Return figures of the iterations after the first two."""
    lower, upper = race.batch(one.examples, 1), race.batch(one.examples, 2)
    run = iteration(race, one.contender, lower, upper)
    for _ in range(2):  # Rules per example are verified at the first; kernels are chosen.
        run()
    if one.measure == "launches":
        return {"status": MEASURED, **meter.counted(run)._asdict()}
    allocated, reserved = meter.peak(run, race.held_bytes)
    seconds, events = meter.seconds(run, rounds)
    return {
        "status": MEASURED,
        "seconds": seconds,
        "device_seconds": events,
        "peak_allocated": allocated,
        "peak_reserved": reserved,
    }


def _fits(race: Race, one: Case, meter: Meter) -> dict[str, Any]:
    assert one.cap is not None
    lower, upper = race.batch(one.examples, 1), race.batch(one.examples, 2)

    def first_two() -> None:
        run = iteration(race, one.contender, lower, upper)
        for _ in range(2):
            run()

    try:
        fits = meter.fits(first_two, race.held_bytes, one.cap)
    except ValueError as error:
        return {"status": NOT_MEASURED, "reason": str(error)}
    return {"status": MEASURED if fits else NO_MEMORY}


def hypergradients(race: Race, one: Case, samples: int) -> list[float]:
    """Return the hypergradients of single examples along iterations, each a row of the table.

    Every contender sees the same examples from the same θ.
    """
    run = differentiating(race, one.contender)
    found = []
    for step in range(COLD + samples):
        lower, upper = race.batch(1, 10 + 2 * step), race.batch(1, 11 + 2 * step)
        row = step % INSTANCES
        lower["index"] = torch.full_like(lower["index"], row)
        hypergradient = run(lower, upper)
        assert hypergradient is not None
        if step >= COLD:
            found.append(float(hypergradient[row]))
    return found
