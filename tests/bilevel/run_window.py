"""The lower steps of a window and its hypergradient, without a solver."""

from __future__ import annotations

from typing import Any, NamedTuple

from bilevel import OneStepRecord, Point, Window, take_window
from bilevel.hypergradients.base import lower_route
from bilevel.lower.lower_pass import LowerPass
from bilevel.lower.steps import take_steps


class WindowTaken(NamedTuple):
    """Where the steps ended, and the fields of the `HypergradientResult` (or None)."""

    lower_params: Any
    optimizer_state: Any
    passes: tuple[LowerPass, ...]
    upper_loss: Any = None
    hypergradient: Any = None
    memory: Any = None
    figures: Any = None
    notes: tuple[str, ...] = ()
    upper_aux: Any = None


class StepTaken(NamedTuple):
    """A lower step with its hypergradient, and what `OneStep` recorded of it."""

    lower_params: Any
    optimizer_state: Any
    record: OneStepRecord
    passed: LowerPass
    hypergradient: Any
    direction: Any

    @property
    def upper(self) -> Any:
        return self.record.upper


def run_window(
    method,
    problem,
    optimizer,
    lower_params,
    upper_params,
    optimizer_state,
    batches,
    upper_batch=None,
    memory=None,
) -> WindowTaken:
    """Take the steps; with an upper batch, differentiate through them."""
    start = Point(lower_params, optimizer_state)
    window = Window(problem, optimizer, start, upper_params, batches)
    steps, result = take_window(window, method, upper_batch, memory)
    return WindowTaken(*steps.end, steps.passes, *(result or ()))


def run_step(
    one_step,
    problem,
    optimizer,
    lower_params,
    upper_params,
    optimizer_state,
    micro_batches,
    upper_batch,
    direction=None,
) -> StepTaken:
    """Take one lower step and differentiate through it by `OneStep`."""
    start = Point(lower_params, optimizer_state)
    window = Window(problem, optimizer, start, upper_params, [micro_batches])
    record = one_step.record(window, upper_batch, direction)
    steps = take_steps(window, lower_route(one_step), record)
    passed = record.passed  # with its gradient, which the record drops once μ is made of it
    result = record.hypergradient(steps.end)
    return StepTaken(*steps.end, record, passed, result.hypergradient, result.memory)
