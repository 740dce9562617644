"""The route for several examples whose μ is known only after the lower step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from bilevel.checks import require
from bilevel.lower.gradient_sum import GradientSum
from bilevel.lower.micro_batch import PassContext
from bilevel.lower.route import BackwardPass
from bilevel.routes.jvp import ForwardProducts
from bilevel.routes.tapped import ENTRIES_LIMIT, tapped_backward


@dataclass(frozen=True)
class PerExample(ForwardProducts):
    """As ``Ghost``, for μ that is known only after the lower step (order lower-first).

    What the products need is kept until then: per-example gradients, or activations and output
    gradients where these are smaller. Memory: up to batch × θ, for every micro-batch of the step.

    On the first step and for new shapes the gradient is compared with autograd's, for the time and
    memory of two plain passes; where examples influence each other the route refuses.

    Args:
        entries_limit: Per-example gradients of a linear layer with more entries than this (batch
            times weight) are not kept; its activations and output gradients are.
    """

    entries_limit: int = ENTRIES_LIMIT

    per_example: ClassVar[bool] = True
    second_order: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self, "entries_limit", self.entries_limit)

    def backward_pass(self, context: PassContext, total: GradientSum) -> BackwardPass:
        """Return the backward pass under taps, which keep what the products need."""
        return partial(
            tapped_backward,
            context,
            refusing="PerExample",
            entries_limit=self.entries_limit,
        )
