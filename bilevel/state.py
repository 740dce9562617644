"""What a bilevel run consists of, and what is known of one of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from bilevel.problem import Lower, Upper


class BilevelState(NamedTuple, Generic[Lower, Upper]):
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
        lower_steps: Lower steps taken.
        upper_steps: Upper steps taken.
        upper_skipped: Upper steps not taken because their hypergradient, the upper loss or a lower
            gradient of their window was not finite.
        lower_skipped: Lower steps, of those in ``lower_steps``, that left θ as it was because their
            gradient was not finite.
    """

    lower_params: Lower
    upper_params: Upper
    lower_optimizer: Any
    upper_optimizer: Any
    memory: Any
    lower_steps: Int64[Tensor, ""]
    upper_steps: Int64[Tensor, ""]
    upper_skipped: Int64[Tensor, ""]
    lower_skipped: Int64[Tensor, ""]


class StepInfo(NamedTuple):
    """What happened in a lower step.

    Without an upper step after it, the fields of the upper level are None.

    Attributes:
        lower_loss: Weighted mean loss over all micro-batches, at the parameters before the step.
        lower_grad_norm: Norm of its gradient, before clipping.
        lower_clipped: Whether the lower optimizer clipped it.
        losses: Unweighted losses, micro-batches put end to end; None for a
            ``BilevelProblem``.
        weights: The weights with which the step was taken, likewise.
        upper_loss: Upper loss, where the hypergradient evaluates it.
        hypergradient_norm: Norm of dL_upper/dφ, before clipping.
        upper_clipped: Whether the upper optimizer clipped it.
        notes: Route that stepped in and why, near-zero derivatives, skipped updates and the like.
        lower_aux: What the lower loss returned beside its value, one per micro-batch.
        upper_aux: What the upper loss returned beside its value.
        figures: Further scalars of the hypergradient (residual, iterations, ...); mostly empty.
    """

    lower_loss: Float[Tensor, ""]
    lower_grad_norm: Float[Tensor, ""]
    lower_clipped: Bool[Tensor, ""]
    losses: Float[Tensor, " batch"] | None
    weights: Float[Tensor, " batch"] | None
    upper_loss: Float[Tensor, ""] | None
    hypergradient_norm: Float[Tensor, ""] | None
    upper_clipped: Bool[Tensor, ""] | None
    notes: tuple[str, ...]
    lower_aux: tuple[Any, ...] = ()
    upper_aux: Any = None
    figures: Mapping[str, Float[Tensor, ""]] = {}  # never written to


def check_state(state: object) -> None:
    """Refuse anything but a state.

    Raises:
        TypeError: Parameters, a batch or the like.
    """
    if not isinstance(state, BilevelState):
        raise TypeError(
            "state: expected what solver.init(lower_params, upper_params) or the last step "
            f"returned, found a {type(state).__name__}"
        )
