"""The same run by both executions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bilevel import BilevelSolver, BilevelState, ResidentSolver, StepInfo, tree
from tests.bilevel.comparing import relative


@dataclass(frozen=True)
class Run:
    """Where a run ended, and what is known of each of its lower steps."""

    state: BilevelState[Any, Any]
    infos: list[StepInfo]


def run(solver, case, windows, steps, upper=True) -> Run:
    """So many lower steps through `windows`, an endless list of micro-batches per step."""
    torch.manual_seed(5)
    params = tree.map(torch.clone, case.params)
    state, infos, taken = solver.init(params, case.upper_params), [], 0
    while taken < steps:
        due = solver.next_steps(state, steps - taken)
        batches = [windows[(taken + step) % len(windows)] for step in range(due.lower)]
        upper_batch = case.upper_batch if due.upper and upper else None
        state, found = solver.advance(state, batches, upper_batch)
        infos, taken = [*infos, *found], taken + due.lower
    return Run(state, infos)


def both(case, windows, steps, *arguments, **options) -> tuple[Run, Run]:
    """The run by the functional and by the resident execution."""
    solvers = (
        kind(case.problem, *arguments, accumulation=len(windows[0]), **options)
        for kind in (BilevelSolver, ResidentSolver)
    )
    functional, resident = (run(solver, case, windows, steps) for solver in solvers)
    return functional, resident


def assert_close(found, expected, tolerance) -> None:
    """Two trees of tensors differ by at most `tolerance`, relative to their norms."""
    assert tree.names(found, none_is_leaf=True) == tree.names(expected, none_is_leaf=True)
    found, expected = (tree.map(torch.Tensor.double, one) for one in (found, expected))
    if not tree.leaves(expected):
        return
    if tree.norm(expected) == 0.0:
        assert tree.norm(found) == 0.0
    else:
        assert relative(found, expected) <= tolerance


def assert_same_run(found: Run, expected: Run, tolerance: float) -> None:
    """States, random numbers and the figures of every step agree."""
    for name in ("lower_params", "upper_params", "lower_optimizer", "upper_optimizer", "memory"):
        assert_close(getattr(found.state, name), getattr(expected.state, name), tolerance)
    for name in ("lower_steps", "upper_steps", "upper_skipped", "lower_skipped"):
        assert torch.equal(getattr(found.state, name), getattr(expected.state, name)), name
    for one, other in zip(found.infos, expected.infos, strict=True):
        assert one.notes == other.notes
        assert one.lower_clipped == other.lower_clipped
        for name in ("lower_loss", "lower_grad_norm", "losses", "weights", "upper_loss"):
            pair = getattr(one, name), getattr(other, name)
            torch.testing.assert_close(*pair, rtol=tolerance, atol=1e-300, equal_nan=True)
        assert (one.hypergradient_norm is None) == (other.hypergradient_norm is None)
        if one.hypergradient_norm is not None:
            pair = one.hypergradient_norm, other.hypergradient_norm
            torch.testing.assert_close(*pair, rtol=tolerance, atol=1e-300, equal_nan=True)
