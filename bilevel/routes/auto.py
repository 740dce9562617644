"""The route that chooses among the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from bilevel.lower.gradient_sum import GradientSum
from bilevel.lower.micro_batch import PassContext
from bilevel.lower.route import BackwardPass, DerivativeRequest
from bilevel.routes.jvp import ForwardProducts
from bilevel.routes.reverse import double_backward
from bilevel.routes.tapped import tapped_backward


@dataclass(frozen=True)
class Auto(ForwardProducts):
    """The cheapest exact route that applies, decided micro-batch by micro-batch.

    For a ``ReweightingProblem`` with detached features: ``Dot`` for single examples, else ``Ghost``
    (order upper-first) or ``PerExample`` (lower-first), else, if the model uses a parameter in a
    way these have no rule for, ``Jvp``, and ``StepInfo.notes`` says why. For everything else
    ``Jvp``, but ``Reverse`` where derivatives of the gradient in θ and in φ are wanted together:
    both take as long there, and ``Jvp`` (forward over reverse) takes more memory.
    """

    second_order: ClassVar[bool] = False

    def backward_pass(self, context: PassContext, total: GradientSum) -> BackwardPass:
        """Return the backward pass under taps; a plain one where these have no rule."""
        return partial(tapped_backward, context)

    def gradient_derivative(self, request: DerivativeRequest) -> Sequence[Tensor | None]:
        """Return the derivative of the wanted gradients: of both by double backward."""
        if request.lower and request.upper:
            return double_backward(request)
        return super().gradient_derivative(request)
