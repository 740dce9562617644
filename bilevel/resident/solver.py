"""The solver whose state lives in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bilevel import tree
from bilevel.hypergradients.base import HypergradientResult
from bilevel.hypergradients.one_step import OneStep
from bilevel.lower.guard import LOOKS, Guard
from bilevel.lower.steps import LowerSteps, Window
from bilevel.problem import BatchT, Lower, Upper
from bilevel.resident import lower_first, upper_first
from bilevel.resident.memory import shared_leaves
from bilevel.resident.scope import check_scope
from bilevel.solver import BilevelSolver, LowerBatches
from bilevel.state import BilevelState, StepInfo, check_state

CONSUMED = -1  # the lower steps of a state whose tensors have moved on


@dataclass(frozen=True)
class ResidentSolver(BilevelSolver[Lower, Upper, BatchT]):
    """``BilevelSolver`` with θ, its gradient and the optimizer's moments in place.

    The same steps and the same hypergradient, up to rounding, in a third of the memory: for models
    of which few copies fit. A state is *consumed* by the call that it is given to: θ, the moments
    and the average of v change where they are, and what was before a step is gone. A state that is
    used again is refused. φ and its optimizer are pure, as ever.

    Copies of θ at the peak, beside activations, with an optimizer of two moments:

    ==============================================  ======  ==================================
    ``OneStep(…)``                                  copies  lower steps
    ==============================================  ======  ==================================
    none (no upper batch), one micro-batch          4       any route
    ``Dot()``, lower-first                          4       one example each
    ``Dot()``, upper-first                          5       any number of micro-batches of one
    ``Ghost()``, upper-first                        5       one micro-batch
    … with ``direction_decay``                      + 1
    … with ``upper_gradient_every`` alone           + 1
    ==============================================  ======  ==================================

    Every other route serves in order upper-first, too, with what it needs itself beside that. More
    than one micro-batch of several examples costs one gradient more. On a device a single example's
    gradient and v are gathered in pieces of 2²⁸ entries (``bilevel.resident.pieces``), which takes
    one piece more, and two in the step.

    A step whose gradient is not finite is left out, and so is an upper step, as in
    ``BilevelSolver``: the loss and the norm of the gradient are looked at before θ moves. ``Adam``
    and ``AdamW`` take torch's fused kernel, which rounds otherwise than ``update``. With all other
    optimizers, in order upper-first, a run has the bits of ``BilevelSolver``'s where each parameter
    has memory of its own: that one leaves small ones in blocks (``optimizers.buckets``), and matrix
    products round by alignment. Lower-first the product is another one, ⟨(∂θ'/∂g) ∇ℓ, v⟩.

    ::

        f = bilevel.functional(module)
        solver = ResidentSolver(problem, AdamW(1e-5), Adam(1e-2), OneStep(Dot()))
        state = solver.init(f.module_params, phi)  # θ is the module's own parameters from now on
        state, infos = solver.advance(state, [[batch]], upper_batch)

    The arguments are those of ``BilevelSolver``. With ``collective=Replicas(...)``, in order
    upper-first, there is one gradient more while the ranks' are summed. With
    ``collective=Shards(...)`` each holds a part of θ: ``Dot()`` in order upper-first.

    Raises:
        ValueError: As ``BilevelSolver``, and for what it does not do: ``rollback``, ``initial``,
            ``hyperparameters``, a hypergradient other than ``OneStep``, ``Sama``, or in order
            lower-first another route than ``Dot()``, ``accumulation`` above 1, several ranks,
            ``direction_decay`` or ``differentiate_clip``.
    """

    in_place: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scope(self)

    def _adopted(self, lower_params: Lower) -> Lower:
        shared = shared_leaves(lower_params)
        if shared is not None:
            first, second = shared
            raise ValueError(
                f"lower_params: {first!r} and {second!r} share memory, and a step in place would "
                "move it twice; give a tied parameter once, and clone what is expanded"
            )
        return tree.map(Tensor.detach, lower_params)

    def _place_in_window(self, state: BilevelState[Lower, Upper]) -> int | None:
        check_state(state)
        if is_consumed(state):
            raise ValueError(
                "ResidentSolver: this state was consumed by an earlier call, which has changed its "
                "tensors in place; go on from the state that the call returned, or, if it failed, "
                "from a checkpoint"
            )
        return super()._place_in_window(state)

    def advance(
        self,
        state: BilevelState[Lower, Upper],
        batches: LowerBatches[BatchT],
        upper_batch: BatchT | None = None,
        *,
        guard: Guard = LOOKS,
    ) -> tuple[BilevelState[Lower, Upper], tuple[StepInfo, ...]]:
        """Take these lower steps and, given a batch for it, an upper step, due or not.

        Args:
            state: From ``init`` or the last call; consumed, also by a call that fails after θ has
                moved.
            batches: Per lower step its micro-batches, ``accumulation`` of them.
            upper_batch: None: no upper step.
            guard: As there; in order upper-first and without an average of v.

        Returns:
            As ``BilevelSolver.advance``.

        Raises:
            ValueError: As ``BilevelSolver.advance``; or the state was consumed.
            bilevel.Refusal: ``Ghost`` or ``PerExample`` has no rule for something the model does.
        """
        before = _versions(state)
        try:
            return super().advance(state, batches, upper_batch, guard=guard)
        finally:
            if _versions(state) != before:
                state.lower_steps.fill_(CONSUMED)

    def _taken(
        self, window: Window, upper_batch: BatchT | None, memory: Any
    ) -> tuple[LowerSteps, HypergradientResult | None]:
        method = self.hypergradient
        assert isinstance(method, OneStep)
        if method.order == "lower-first":
            return lower_first.take_window(window, method, upper_batch)
        return upper_first.take_window(window, method, upper_batch, memory)


def is_consumed(state: BilevelState[Any, Any]) -> bool:
    """Return whether the tensors of a state have moved on to a later one."""
    return int(state.lower_steps) == CONSUMED


def _versions(state: object) -> list[int]:
    """Return how often each tensor that steps change in place has been changed so far."""
    check_state(state)
    assert isinstance(state, BilevelState)
    changing = (state.lower_params, state.lower_optimizer, state.memory)
    return [leaf._version for leaf in tree.leaves(changing)]
