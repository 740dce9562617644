"""An audit of the hypergradient on the user's own problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel import tree
from bilevel.audit.steps import AuditedSolution, AuditedSteps, constants_move, slope_errors
from bilevel.autodiff.recomputation import RecomputationError
from bilevel.hypergradients.base import Hypergradient, spans_window
from bilevel.hypergradients.one_step import OneStep
from bilevel.problem import BatchT, Lower, Params, Upper
from bilevel.solver import BilevelSolver
from bilevel.state import BilevelState
from bilevel.tree import Tree

# Largest relative error that passes, by the least precise parameter.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-2}

# Largest relative error of the slopes of the lower loss that passes.
SLOPES = 1e-2

Outcome = Literal["agrees", "disagrees", "inconclusive", "approximates"]

STEPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclass(frozen=True)
class HypergradientCheck:
    """Verdict of ``check_hypergradient``; true if the hypergradient agrees. Print it.

    Attributes:
        outcome: "agrees", "disagrees", "inconclusive": rounding hides the answer, or the error
            still falls at the smallest step; or "approximates": the method is by design not the
            derivative through the steps, and ``relative_error`` is how far from it it is here.
        relative_error: Of the directional derivatives, at the best step.
        errors: Finite-difference step (relative to φ) -> relative error.
        best_step: The step with the smallest error.
        tolerance: Largest relative error that agrees.
        lower_gradient_error: Relative error of the route's θ gradient against plain autograd.
        lower_slope_error: The same against differences of the lower loss, by forward passes alone;
            0 where rounding hides them. It may be up to 1e-2, as losses compute in less precision
            than their parameters have; faults of this kind are larger.
        approximation_error: For methods that are not exact by design: how far the hypergradient is
            from the true derivative of the upper loss after the steps. None for exact ones.
        message: All this in words.
        stop_gradient_error: How far the hypergradient is from the derivative in which the constants
            of autograd (detached features, ``.detach()``, ``torch.no_grad``) move with φ, too. None
            where none of them depends on φ.
    """

    outcome: Outcome
    relative_error: float
    errors: dict[float, float]
    best_step: float
    tolerance: float
    lower_gradient_error: float
    lower_slope_error: float
    approximation_error: float | None
    message: str
    stop_gradient_error: float | None = None

    def __bool__(self) -> bool:
        return self.outcome == "agrees"

    def __str__(self) -> str:
        return self.message


def check_hypergradient(
    solver: BilevelSolver[Lower, Upper, BatchT],
    state: BilevelState[Lower, Upper],
    lower_batches: Sequence[Any],
    upper_batch: BatchT,
    *,
    directions: int = 4,
    steps: Sequence[float] = STEPS,
    solve_steps: int = 0,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> HypergradientCheck:
    """Compare the hypergradient with central differences through the whole of its lower steps.

    For random directions d in φ, the slope ⟨dL_upper/dφ, d⟩ is compared with::

        (f(φ + ε d) − f(φ − ε d)) / 2ε,     f(φ) = L_upper(θ(φ), φ)

    where θ(φ) is reached by the lower steps that the hypergradient says it goes through (one for
    ``OneStep``; for a truncated ``Unrolled`` the point before its steps is held constant), taken by
    plain autograd with the same random numbers and the clip scales of the steps held constant
    unless they are differentiated.

    What autograd treats as a constant although it depends on θ counts as one here, too: features of
    a ``ReweightingProblem`` with ``detach_features``, results of ``.detach()``, of ``.item()`` and
    of ``torch.no_grad``. Both sides of a difference have them as they are at φ. In a window or at a
    solution they would move with φ; how far the hypergradient is from the derivative in which they
    do is reported as ``stop_gradient_error``.

    ``OneStep`` in order upper-first, or with another ``update_derivative`` than ``Exact``, stands
    for another derivative by design: f(φ) = ⟨μ, ∇_θ L_lower(θ, φ)⟩ + L_upper(·, φ) with its own μ.
    The distance from the true derivative is reported as ``approximation_error``. Methods that do
    not go through the steps (``Implicit``, ``Penalty``) are compared with the derivative through
    the whole window and called "approximates", with that distance, unless they agree.

    With ``solve_steps`` = N, ``Implicit`` is held to what it claims: N plain lower steps on the
    micro-batches, with the same random numbers in each, solve the lower level; the hypergradient is
    computed there (after one more step), and f(φ) goes on from there for N steps under φ. Both are
    right only as far as N steps solve it, so the message says how far θ still moved and what
    stationarity ``Implicit`` found, and damping counts as an error. Choose N by it: where the lower
    level contracts by a factor r per step, r^N is the relative error of the comparison.

    Nothing is changed. An average of v (``direction_decay``) and a v of an earlier step
    (``upper_gradient_every``) are left out of the audit. Use float64
    parameters and batches where possible: differences of float32 losses drown small slopes.

    Args:
        solver: The solver to audit.
        state: Where; best after a few steps, not from a cold optimizer.
        lower_batches: As for ``solver.step``, the micro-batches of one step; or as for
            ``solver.window``, the micro-batches of each step, where ``solver.step`` would refuse.
        upper_batch: As for both.
        directions: How many random directions.
        steps: Values of ε to try, relative to the size of φ's entries.
        solve_steps: Lower steps that solve the lower level, for ``Implicit``; 0: those of
            the window.
        tolerance: Largest relative error that agrees; None: 1e-5 for float64, 2e-2 for float32,
            0.2 below.
        generator: Of the directions.

    Cost: that of the hypergradient, and 3F for each lower step of every evaluation of f, of which
    there are two per direction and step size (and once more for the steps themselves).

    Raises:
        ValueError: ``solve_steps`` for a method that is not the derivative of the solved lower
            level, or a solver of several ranks.
    """
    if tolerance is None:
        precisions = {leaf.dtype for leaf in tree.leaves((state.lower_params, state.upper_params))}
        tolerance = max(TOLERANCES.get(dtype, 0.2) for dtype in precisions)
    try:
        audit = _audited(solver, state, lower_batches, upper_batch, solve_steps)
    except RecomputationError as error:
        return _without_gradient(error, tolerance)
    along = [_random_like(state.upper_params, generator) for _ in range(directions)]
    result = audit.result
    assert result.hypergradient is not None
    slopes = [float(tree.vdot(result.hypergradient, direction)) for direction in along]
    truth: Callable[[Params], Tensor] = audit.upper_after
    claimed = truth
    stands_for_itself = not audit.exact and isinstance(solver.hypergradient, OneStep)
    if stands_for_itself:
        assert isinstance(audit, AuditedSteps)
        claimed = audit.claimed_by_one_step()
    errors, floors = slope_errors(claimed, state.upper_params, along, steps, slopes)
    best = min(errors, key=lambda step: errors[step])
    approximation = None
    if not audit.exact:
        true_errors = errors
        if stands_for_itself:
            true_errors, _ = slope_errors(truth, state.upper_params, along, steps, slopes)
        approximation = min(true_errors.values())
    stopped = None
    if along and constants_move(audit, state.upper_params, along[0], max(steps)):
        whole = audit.upper_after_whole
        whole_errors, _ = slope_errors(whole, state.upper_params, along, steps, slopes)
        stopped = min(whole_errors.values())
    outcome: Outcome = "agrees"
    lower_errors = audit.lower_gradient_error, audit.lower_slope_error
    right_gradient = lower_errors[0] <= tolerance and lower_errors[1] <= max(tolerance, SLOPES)
    if not (right_gradient and errors[best] <= tolerance):
        hidden = errors[best] <= 10.0 * floors[best] or _still_falling(errors)
        outcome = "inconclusive" if hidden and right_gradient else "disagrees"
        if outcome == "disagrees" and right_gradient and not (audit.exact or stands_for_itself):
            outcome = "approximates"
    return HypergradientCheck(
        outcome=outcome,
        relative_error=errors[best],
        errors=errors,
        best_step=best,
        tolerance=tolerance,
        lower_gradient_error=audit.lower_gradient_error,
        lower_slope_error=audit.lower_slope_error,
        approximation_error=approximation,
        message=_message(
            outcome,
            errors,
            best,
            tolerance,
            lower_errors,
            approximation,
            stopped,
            solver.hypergradient,
            (*result.notes, *audit.notes),
        ),
        stop_gradient_error=stopped,
    )


def _audited(
    solver: BilevelSolver[Any, Any, Any],
    state: BilevelState[Any, Any],
    lower_batches: Sequence[Any],
    upper_batch: Any,
    solve_steps: int,
) -> AuditedSteps | AuditedSolution:
    if solver.collective.ranks > 1:
        raise ValueError(
            f"check_hypergradient: expected one process, found {solver.collective.ranks} ranks; "
            "audit a solver without collective, on batches of a size that one process can take"
        )
    if solve_steps:
        if not getattr(solver.hypergradient, "at_solution", False):
            raise ValueError(
                f"solve_steps={solve_steps}: {type(solver.hypergradient).__name__} is not the "
                "derivative of the solved lower level, as Implicit is; leave solve_steps out"
            )
        return AuditedSolution(solver, state, lower_batches, upper_batch, solve_steps)
    window = spans_window(solver.hypergradient, solver.unroll_steps)
    batches = lower_batches if window else [lower_batches]
    return AuditedSteps(solver, state, batches, upper_batch)


def _without_gradient(error: RecomputationError, tolerance: float) -> HypergradientCheck:
    """Return the verdict where the lower gradient has been refused."""
    return HypergradientCheck(
        outcome="disagrees",
        relative_error=math.inf,
        errors={},
        best_step=math.nan,
        tolerance=tolerance,
        lower_gradient_error=math.inf,
        lower_slope_error=math.inf,
        approximation_error=None,
        message=f"hypergradient disagrees\n  the lower gradient itself is wrong: {error}",
    )


def _random_like(params: Tree, generator: torch.Generator | None) -> Tree:
    return tree.map(
        lambda leaf: torch.randn(
            leaf.shape,
            dtype=leaf.dtype,
            generator=generator,
            device=leaf.device if generator is None else generator.device,
        ).to(leaf.device),
        params,
    )


def _still_falling(errors: dict[float, float]) -> bool:
    """Whether the error fell with the step to the last: a wrong slope's error would level off."""
    smallest = sorted(errors)[:3]
    if len(smallest) < 3:
        return False
    fine, middle, coarse = (errors[step] for step in smallest)
    return fine < middle / math.sqrt(smallest[1] / smallest[0]) and middle < coarse


def _message(
    outcome: str,
    errors: dict[float, float],
    best: float,
    tolerance: float,
    lower_errors: tuple[float, float],
    approximation: float | None,
    stopped: float | None,
    method: Hypergradient,
    notes: Sequence[str],
) -> str:
    lines = [
        f"hypergradient {outcome}: relative error {errors[best]:.1e} at step {best:g}, tolerance "
        f"{tolerance:.1e}",
        "  by step: " + ", ".join(f"{step:g}: {error:.1e}" for step, error in errors.items()),
        f"  lower gradient against plain autograd: relative error {lower_errors[0]:.1e}",
        f"  lower gradient against differences of the loss: relative error {lower_errors[1]:.1e}",
    ]
    if approximation is not None:
        name = type(method).__name__
        if isinstance(method, OneStep):
            name = f"order {method.order} with {method.update_derivative!r}"
        lines.append(
            f"  {name} is {approximation:.1e} away from the true derivative of the upper loss "
            "after the steps, by design (OneStep in order lower-first and Unrolled are exact)"
        )
    if stopped is not None:
        lines.append(
            "  compared with constants held as autograd holds them (detached features, .detach(), "
            f"torch.no_grad); where they move with φ, too, the derivative is {stopped:.1e} away: "
            "ReweightingProblem(detach_features=False) makes features part of the loss, and its "
            "hypergradient whole; leave out a .detach() that is not meant"
        )
    if outcome == "inconclusive" and _still_falling(errors):
        lines.append(
            "  the error still falls with the step: the slope changes within the smallest step, as "
            "with an adaptive optimizer of tiny eps where a gradient or weight is 0; pass smaller "
            "steps, or audit with a larger eps"
        )
    elif outcome == "inconclusive":
        lines.append(
            "  the slopes drown in rounding: use float64 parameters and batches, or a state with "
            "a larger hypergradient (not a cold Adam, not the end of training)"
        )
    elif lower_errors[0] > tolerance:
        lines.append(
            "  the lower gradient itself differs: examples of a batch influence each other's "
            "losses, some operation does not have the examples in its leading dimension, or a "
            "random draw does not come from torch's default generator; try the route Jvp()"
        )
    elif lower_errors[1] > max(tolerance, SLOPES):
        lines.append(
            "  the lower gradient itself is wrong, with plain autograd too: it is not the slope of "
            "the lower loss; look for a part that is recomputed with other parameters in the "
            "backward pass (call the module by bilevel.functional), an in-place change between the "
            "passes, or a custom autograd.Function whose backward is not its derivative"
        )
    elif outcome == "disagrees":
        lines.append(
            "  the lower gradient is right, the hypergradient is wrong; look for: a detach or "
            "no_grad between φ and the weights, an optimizer or custom autograd.Function with a "
            "wrong derivative, weights at a kink of their bound, random numbers not drawn from "
            "torch's default generator; compare with the route Reverse()"
        )
    return "\n".join([*lines, *(f"  note: {note}" for note in notes)])
