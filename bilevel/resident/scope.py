"""What a step in place does not do, refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bilevel.hypergradients.one_step import OneStep
from bilevel.hypergradients.update_derivative import Exact, Identity
from bilevel.optimizers.elementwise import ElementwiseOptimizer
from bilevel.routes import Dot
from bilevel.shards.collective import Shards
from bilevel.solver import BilevelSolver


def check_scope(solver: BilevelSolver[Any, Any, Any]) -> None:
    """Refuse a solver whose steps cannot be taken in place.

    Raises:
        ValueError: What it is and what to choose instead, in one sentence.
    """
    for found, instead in outside(solver):
        raise ValueError(f"ResidentSolver: {found} cannot be done in place; {instead}")


_ELSE = "choose BilevelSolver"


def outside(solver: BilevelSolver[Any, Any, Any]) -> Iterator[tuple[str, str]]:
    """Yield each thing that a solver asks for and a step in place does not do, with advice."""
    optimizer: Any = solver.lower_optimizer
    if not isinstance(optimizer, ElementwiseOptimizer):
        yield f"the step of {type(optimizer).__name__}", "choose an optimizer of bilevel"
    if solver.rollback:
        yield "rollback, which goes back to the θ before a step,", _ELSE
    for name in ("initial", "hyperparameters"):
        if getattr(solver, name) is not None:
            yield f"{name}, from which φ moves θ by other ways than its loss,", _ELSE
    method = solver.hypergradient
    if not isinstance(method, OneStep):
        yield f"{type(method).__name__}, which keeps θ of several steps,", _ELSE
        return
    if not isinstance(method.update_derivative, Exact | Identity):
        yield f"{type(method.update_derivative).__name__}()", "choose update_derivative=Exact()"
    if isinstance(solver.collective, Shards):
        yield from _outside_shards(solver, method)
    if method.order == "upper-first":
        return
    other = "choose order='upper-first'"
    if solver.collective.ranks > 1:
        yield "order lower-first over several ranks", other
    if method.route != Dot():
        yield f"order lower-first by the route {method.route!r}", f"choose Dot(), or {other[7:]}"
    if solver.accumulation > 1:
        yield f"order lower-first with accumulation={solver.accumulation}", other
    if method.direction_decay:
        yield f"order lower-first with direction_decay={method.direction_decay}", other
    if optimizer.differentiate_clip:
        yield "order lower-first with differentiate_clip=True", f"{other}, or leave it out"


def _outside_shards(
    solver: BilevelSolver[Any, Any, Any], method: OneStep
) -> Iterator[tuple[str, str]]:
    """Yield each thing that is not proven over shards of θ."""
    if method.order != "upper-first":
        yield f"order {method.order} over Shards", "choose order='upper-first'"
    if method.route != Dot():
        yield f"the route {method.route!r} over Shards", "choose Dot()"
