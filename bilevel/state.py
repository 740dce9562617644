"""What a bilevel run consists of, and what is known of one of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from bilevel.problem import Params


class BilevelState(NamedTuple):
    """Everything that a run consists of, as a pytree of tensors.

    A checkpoint is ``tree.flatten(state)`` (and torch's random state, and the order of the data);
    ``tree.unflatten(named, solver.init(...))`` brings it back.

    Attributes:
        lower_params: θ.
        upper_params: φ.
        lower_optimizer: State of the lower optimizer.
        upper_optimizer: State of the upper optimizer.
        memory: What the hypergradient keeps from window to window (an average of v, a warm start,
            a second copy of θ), or None.
        lower_steps: Lower steps taken, int64 scalar.
        upper_steps: Upper steps taken, int64 scalar.
        upper_skipped: Upper steps not taken because their hypergradient was not finite, int64.
    """

    lower_params: Params
    upper_params: Params
    lower_optimizer: Any
    upper_optimizer: Any
    memory: Any
    lower_steps: Tensor
    upper_steps: Tensor
    upper_skipped: Tensor


class StepInfo(NamedTuple):
    """What happened in a lower step.

    Without an upper step after it, the fields of the upper level are None.

    Attributes:
        lower_loss: Weighted mean loss over all micro-batches, at the parameters before the step.
        lower_grad_norm: Norm of its gradient, before clipping.
        lower_clipped: Whether the lower optimizer clipped it (bool scalar).
        losses: Unweighted losses [batch], micro-batches put end to end; None for a
            ``BilevelProblem``.
        weights: The weights [batch] with which the step was taken, likewise.
        upper_loss: Upper loss, where the hypergradient evaluates it.
        hypergradient_norm: Norm of dL_upper/dφ, before clipping.
        upper_clipped: Whether the upper optimizer clipped it (bool scalar).
        notes: Route that stepped in and why, near-zero derivatives, skipped updates and the like.
        lower_aux: What the lower loss returned beside its value, one per micro-batch.
        upper_aux: What the upper loss returned beside its value.
        figures: Further scalars of the hypergradient (residual, iterations, ...); mostly empty.
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
    lower_aux: tuple[Any, ...] = ()
    upper_aux: Any = None
    figures: Mapping[str, Tensor] = {}  # never written to
