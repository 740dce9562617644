"""An audit of the hypergradient on the user's own problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bilevel import tree
from bilevel.audited_step import AuditedStep, slope_errors
from bilevel.one_step import OneStep
from bilevel.problem import Batch
from bilevel.solver import BilevelSolver, BilevelState
from bilevel.tree import Tree

# Largest relative error that passes, by the least precise parameter.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-2}

STEPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclass(frozen=True)
class HypergradientCheck:
    """Verdict of `check_hypergradient`; true if the hypergradient agrees. Print it.

    Attributes:
        outcome: "agrees", "disagrees", or "inconclusive": rounding hides the answer, or the
            error still falls at the smallest step.
        relative_error: Of the directional derivatives, at the best step.
        errors: Finite-difference step (relative to φ) -> relative error.
        best_step: The step with the smallest error.
        tolerance: Largest relative error that agrees.
        lower_gradient_error: Relative error of the route's θ gradient against plain autograd.
        approximation_error: For order upper-first: how far its hypergradient is from the true
            derivative of the upper loss after the step; None for lower-first, which is exact.
        message: All this in words.
    """

    outcome: Literal["agrees", "disagrees", "inconclusive"]
    relative_error: float
    errors: dict[float, float]
    best_step: float
    tolerance: float
    lower_gradient_error: float
    approximation_error: float | None
    message: str

    def __bool__(self) -> bool:
        return self.outcome == "agrees"

    def __str__(self) -> str:
        return self.message


def check_hypergradient(
    solver: BilevelSolver,
    state: BilevelState,
    lower_batches: Sequence[Batch],
    upper_batch: Batch,
    *,
    directions: int = 4,
    steps: Sequence[float] = STEPS,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> HypergradientCheck:
    """Compare the hypergradient with central differences through the whole step.

    For random directions d in φ, the slope ⟨dL_upper/dφ, d⟩ is compared with::

        (f(φ + ε d) − f(φ − ε d)) / 2ε,     f(φ) = L_upper(θ'(φ), φ)

    where θ'(φ) is the lower step, taken by plain autograd with the same random numbers (and the
    clip scale of the step held constant unless it is differentiated). In order upper-first, which
    stands for another derivative by design, f(φ) = ⟨μ, ∇_θ L_lower(θ, φ)⟩ + L_upper(θ, φ) with its
    own μ, and the distance from the true derivative is reported as `approximation_error`.

    Nothing is changed. An average of v (`direction_decay`) is left out of the audit. Use float64
    parameters and batches where possible: differences of float32 losses drown small slopes.

    Args:
        solver: The solver to audit.
        state: Where; best after a few steps, not from a cold optimizer.
        lower_batches: As for `solver.step`.
        upper_batch: As for `solver.step`.
        directions: How many random directions.
        steps: Values of ε to try, relative to the size of φ's entries.
        tolerance: Largest relative error that agrees; None: 1e-5 for float64, 2e-2 for float32,
            0.2 below.
        generator: Of the directions.
    """
    assert isinstance(solver.hypergradient, OneStep)
    audit = AuditedStep(solver, state, lower_batches, upper_batch)
    along = [_random_like(state.upper_params, generator) for _ in range(directions)]
    result = audit.result
    assert result.hypergradient is not None
    slopes = [float(tree.vdot(result.hypergradient, direction)) for direction in along]
    truth = audit.upper_after_step
    claimed = truth if solver.hypergradient.order == "lower-first" else audit.claimed_upper_first()
    errors, floors = slope_errors(claimed, state.upper_params, along, steps, slopes)
    best = min(errors, key=lambda step: errors[step])
    approximation = None
    if solver.hypergradient.order == "upper-first":
        true_errors, _ = slope_errors(truth, state.upper_params, along, steps, slopes)
        approximation = min(true_errors.values())
    if tolerance is None:
        precisions = {leaf.dtype for leaf in tree.leaves((state.lower_params, state.upper_params))}
        tolerance = max(TOLERANCES.get(dtype, 0.2) for dtype in precisions)
    outcome: Literal["agrees", "disagrees", "inconclusive"] = "agrees"
    if not max(errors[best], audit.lower_gradient_error) <= tolerance:
        hidden = errors[best] <= 10.0 * floors[best] or _still_falling(errors)
        unclear = hidden and audit.lower_gradient_error <= tolerance
        outcome = "inconclusive" if unclear else "disagrees"
    return HypergradientCheck(
        outcome=outcome,
        relative_error=errors[best],
        errors=errors,
        best_step=best,
        tolerance=tolerance,
        lower_gradient_error=audit.lower_gradient_error,
        approximation_error=approximation,
        message=_message(
            outcome,
            errors,
            best,
            tolerance,
            audit.lower_gradient_error,
            approximation,
            solver.hypergradient.notes(result.passed, state.lower_optimizer),
        ),
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
    lower_gradient_error: float,
    approximation: float | None,
    notes: Sequence[str],
) -> str:
    lines = [
        f"hypergradient {outcome}: relative error {errors[best]:.1e} at step {best:g}, tolerance "
        f"{tolerance:.1e}",
        "  by step: " + ", ".join(f"{step:g}: {error:.1e}" for step, error in errors.items()),
        f"  lower gradient against plain autograd: relative error {lower_gradient_error:.1e}",
    ]
    if approximation is not None:
        lines.append(
            f"  order upper-first is {approximation:.1e} away from the true derivative of the "
            "upper loss after the step (order lower-first is exact)"
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
    elif lower_gradient_error > tolerance:
        lines.append(
            "  the lower gradient itself differs: examples of a batch influence each other's "
            "losses, some operation does not have the examples in its leading dimension, or a "
            "random draw does not come from torch's default generator; try the route Jvp()"
        )
    elif outcome == "disagrees":
        lines.append(
            "  look for: a detach or no_grad between φ and the weights, an optimizer or custom "
            "autograd.Function with a wrong derivative, weights at a kink of their bound, random "
            "numbers not drawn from torch's default generator; compare with the route Reverse()"
        )
    return "\n".join([*lines, *(f"  note: {note}" for note in notes)])
