"""The alternation of lower and upper steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import random_state, tree
from bilevel.one_step import Direction, OneStep, OneStepResult
from bilevel.optimizer import DifferentiableOptimizer, Optimizer, clip_scale
from bilevel.problem import Batch, Params, Problem


class BilevelState(NamedTuple):
    """Everything that a run consists of, as a pytree of tensors.

    A checkpoint is ``tree.flatten(state)`` (and torch's random state, and the order of the data);
    ``tree.unflatten(named, solver.init(...))`` brings it back.

    Attributes:
        lower_params: θ.
        upper_params: φ.
        lower_optimizer: State of the lower optimizer.
        upper_optimizer: State of the upper optimizer.
        direction: Average of v, or None.
        lower_steps: Lower steps taken, int64 scalar.
        upper_steps: Upper steps taken, int64 scalar.
    """

    lower_params: Params
    upper_params: Params
    lower_optimizer: Any
    upper_optimizer: Any
    direction: Direction | None
    lower_steps: Tensor
    upper_steps: Tensor


class StepInfo(NamedTuple):
    """What happened in a step. Without an upper step the fields of the upper level are None.

    Attributes:
        lower_loss: Weighted mean loss over all micro-batches, at the parameters before the step.
        lower_grad_norm: Norm of its gradient, before clipping.
        lower_clipped: Whether the lower optimizer clipped it (bool scalar).
        losses: Unweighted losses [batch], micro-batches put end to end; None for a
            `BilevelProblem`.
        weights: The weights [batch] with which the step was taken, likewise.
        upper_loss: Upper loss, where `order` evaluates it.
        hypergradient_norm: Norm of dL_upper/dφ, before clipping.
        upper_clipped: Whether the upper optimizer clipped it (bool scalar).
        notes: Route that stepped in and why, near-zero derivatives and the like.
    """

    lower_loss: Tensor
    lower_grad_norm: Tensor
    lower_clipped: Tensor
    losses: Tensor | None
    weights: Tensor | None
    upper_loss: Tensor | None
    hypergradient_norm: Tensor | None
    upper_clipped: Tensor | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BilevelSolver:
    """Lower steps on θ and, between them, upper steps on φ along the hypergradient.

    Args:
        problem: The losses.
        lower_optimizer: Takes the lower steps; differentiated through.
        upper_optimizer: Takes the upper steps.
        hypergradient: How dL_upper/dφ is computed.
        unroll_steps: Lower steps per upper step; the hypergradient goes through the last one.
        accumulation: Micro-batches per lower step.
        rollback: Look ahead: after an upper step, redo the lower step that it went through from
            the old θ, with the same random numbers and the new φ.
        upper_start: Lower steps before the first upper step is due, at which the first window of
            `unroll_steps` starts.

    With no upper batches, or with the upper learning rate 0, the lower trajectory is bit for bit
    the same; with weights 1 it is that of plain training.

    Raises:
        ValueError: A count below its minimum, or a route that does not apply to the problem.
    """

    problem: Problem
    lower_optimizer: DifferentiableOptimizer
    upper_optimizer: Optimizer
    hypergradient: OneStep = OneStep()
    unroll_steps: int = 1
    accumulation: int = 1
    rollback: bool = False
    upper_start: int = 0

    def __post_init__(self) -> None:
        for name, low in (("unroll_steps", 1), ("accumulation", 1), ("upper_start", 0)):
            if getattr(self, name) < low:
                raise ValueError(
                    f"BilevelSolver: {name} must be at least {low}, got {getattr(self, name)}"
                )
        self.hypergradient.check(self.problem)

    def init(self, lower_params: Params, upper_params: Params) -> BilevelState:
        """Return the state before the first step; the tensors given are never changed.

        Raises:
            ValueError: A parameter is not floating point.
        """
        for level, params in (("lower_params", lower_params), ("upper_params", upper_params)):
            for name, leaf in tree.flatten(params).items():
                if not leaf.is_floating_point():
                    raise ValueError(
                        f"{level}: {name!r} is {leaf.dtype}; expected floating point. Buffers and "
                        "frozen tensors do not belong here: let the loss hold them"
                    )
        lower_params = tree.map(Tensor.detach, lower_params)
        upper_params = tree.map(Tensor.detach, upper_params)
        return BilevelState(
            lower_params=lower_params,
            upper_params=upper_params,
            lower_optimizer=self.lower_optimizer.init(lower_params),
            upper_optimizer=self.upper_optimizer.init(upper_params),
            direction=self.hypergradient.init(lower_params),
            lower_steps=torch.zeros((), dtype=torch.int64),
            upper_steps=torch.zeros((), dtype=torch.int64),
        )

    def wants_upper(self, state: BilevelState) -> bool:
        """Return whether the next step is one after which an upper step is due."""
        since = int(state.lower_steps) - self.upper_start
        return since >= 0 and since % self.unroll_steps == self.unroll_steps - 1

    def step(
        self,
        state: BilevelState,
        lower_batches: Sequence[Batch],
        upper_batch: Batch | None = None,
    ) -> tuple[BilevelState, StepInfo]:
        """Take a lower step and, if it is due and there is a batch for it, an upper step.

        Args:
            state: From `init` or the previous step; not changed.
            lower_batches: The micro-batches, `accumulation` of them.
            upper_batch: None: no upper step. Not looked at unless `wants_upper`.

        Raises:
            ValueError: Another number of micro-batches, or losses or weights of a wrong shape.
            bilevel.Refusal: `Ghost` or `PerExample` has no rule for something the model does.
        """
        upper_batch = upper_batch if self.wants_upper(state) else None
        if len(lower_batches) != self.accumulation:
            raise ValueError(
                f"lower_batches: expected accumulation={self.accumulation} micro-batches, found "
                f"{len(lower_batches)}"
            )
        random = random_state.capture(state.lower_params)
        ahead = taken = self._lower_step(state, state.upper_params, lower_batches, upper_batch)
        upper_params, upper_optimizer = state.upper_params, state.upper_optimizer
        upper_steps = state.upper_steps
        if ahead.hypergradient is not None:
            with torch.no_grad():
                upper_params, upper_optimizer = self.upper_optimizer.update(
                    ahead.hypergradient, upper_optimizer, upper_params
                )
            upper_steps = upper_steps + 1
            if self.rollback:
                random_state.restore(random)
                taken = self._lower_step(state, upper_params, lower_batches, None)
        new_state = BilevelState(
            lower_params=taken.lower_params,
            upper_params=upper_params,
            lower_optimizer=taken.optimizer_state,
            upper_optimizer=upper_optimizer,
            direction=ahead.direction,
            lower_steps=state.lower_steps + 1,
            upper_steps=upper_steps,
        )
        return new_state, self._info(state, taken, ahead)

    def _lower_step(
        self,
        state: BilevelState,
        upper_params: Params,
        lower_batches: Sequence[Batch],
        upper_batch: Batch | None,
    ) -> OneStepResult:
        return self.hypergradient.step(
            self.problem,
            self.lower_optimizer,
            state.lower_params,
            upper_params,
            state.lower_optimizer,
            lower_batches,
            upper_batch,
            state.direction,
        )

    @torch.no_grad()
    def _info(self, state: BilevelState, taken: OneStepResult, ahead: OneStepResult) -> StepInfo:
        micro_batches, shares = taken.passed.micro_batches, taken.passed.shares
        terms = [micro.loss * share for micro, share in zip(micro_batches, shares, strict=True)]
        grad_norm = tree.norm(taken.passed.grads)
        hyper_norm = None if ahead.hypergradient is None else tree.norm(ahead.hypergradient)
        notes = (
            ()
            if ahead.upper is None
            else self.hypergradient.notes(ahead.passed, state.lower_optimizer)
        )
        return StepInfo(
            lower_loss=torch.stack(terms).sum(),
            lower_grad_norm=grad_norm,
            lower_clipped=_clipped(self.lower_optimizer, grad_norm),
            losses=_joined([micro.losses for micro in micro_batches]),
            weights=_joined([micro.weights for micro in micro_batches]),
            upper_loss=None if ahead.upper is None else ahead.upper.loss,
            hypergradient_norm=hyper_norm,
            upper_clipped=(
                None if hyper_norm is None else _clipped(self.upper_optimizer, hyper_norm)
            ),
            notes=notes,
        )


def _clipped(optimizer: Optimizer, norm: Tensor) -> Tensor:
    max_norm = getattr(optimizer, "max_norm", None)
    if max_norm is None:
        return torch.zeros((), dtype=torch.bool, device=norm.device)
    return clip_scale(norm, max_norm) < 1.0


def _joined(pieces: Sequence[Tensor | None]) -> Tensor | None:
    present = [piece.detach() for piece in pieces if piece is not None]
    return torch.cat(present) if present else None
