"""Cost of an upper step whose upper gradient is computed once in N upper steps.

On the embedded model, 32 training examples and 32 meta solutions a step, order upper-first. All
ways take ten steps in turns. The two accountings: against plain training (lower steps alone, 3F,
F being a forward pass), and against the floor of a fresh upper gradient (lower step and upper
gradient, 6F).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from bilevel import SGD, BilevelSolver, OneStep
from bilevel.solver import UNREAD
from recipes.evidence.bench.embedded import Setup, make_setup, parts, warm_state
from recipes.evidence.bench.measure import Timed, in_rounds, median_of, with_flops

EVERY = (1, 2, 5, 10)
STEPS = 10
_PLAIN, _FLOOR = "plain training", "floor"


def ten_steps(setup: Setup, every: int) -> Callable[[], Any]:
    """Return a function that takes ten lower and upper steps from a warm state."""
    solver = BilevelSolver(
        setup.objective.problem(),
        setup.optimizer,
        SGD(1.0),
        OneStep(order="upper-first", upper_gradient_every=every),
    )
    start = warm_state(setup, solver)

    def run() -> Any:
        state = start
        for _ in range(STEPS):
            batch = setup.upper_batch if solver.reads_upper_batch(state) else UNREAD
            state, _ = solver.advance(state, [[setup.lower_batch]], batch)
        return state

    return run


def ways(setup: Setup, every: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """Return ten steps of plain training, of the floor, and with each N."""
    made = parts(setup)

    def plain() -> None:
        for _ in range(STEPS):
            made["lower step"]()

    def floor() -> None:
        for _ in range(STEPS):
            made["lower step"]()
            made["upper gradient"]()

    return {_PLAIN: plain, _FLOOR: floor} | {str(n): ten_steps(setup, n) for n in every}


def measured(every: Sequence[int], rounds: int, batch_size: int = 32) -> list[dict[str, Any]]:
    """Return the rows of the table; ``times_*`` are medians of ratios within a round.

    ``flops_vs_plain`` counts the operations of matrix products, but for those of attention.
    """
    setup = make_setup(batch_size, batch_size)
    runs = ways(setup, every)
    flops = {name: with_flops(run)[1] for name, run in runs.items()}
    timed = {name: Timed(run) for name, run in runs.items()}
    seconds = in_rounds(timed, rounds, clock=time.process_time)

    def row(name: str) -> dict[str, Any]:
        def against(other: str) -> float:
            return round(median_of(seconds, lambda at: at[name] / at[other]), 3)

        return {
            "way": name,
            "cpu_ms_per_step": round(1000 / STEPS * median_of(seconds, lambda at: at[name]), 1),
            "times_plain": against(_PLAIN),
            "times_floor": against(_FLOOR),
            "flops_vs_plain": round(flops[name] / flops[_PLAIN], 3),
        }

    return [row(name) for name in runs]
