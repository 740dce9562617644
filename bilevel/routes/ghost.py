"""The route for several examples whose μ is known before the lower backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from bilevel.lower.gradient_sum import GradientSum
from bilevel.lower.micro_batch import PassContext
from bilevel.lower.route import BackwardPass
from bilevel.routes.jvp import ForwardProducts
from bilevel.routes.tapped import tapped_backward


@dataclass(frozen=True)
class Ghost(ForwardProducts):
    """⟨μ, ∇ℓ_i⟩ of all examples from the activations and output gradients of one backward pass.

    For a linear layer with input a and output gradient b, ``⟨μ_W, ∇_W ℓ_i⟩ = Σ_tokens b·(μ_W a)``,
    and similarly for biases, scales, embeddings and convolutions: see ``bilevel.lower.ghost``.
    Needs μ before the lower backward pass, hence order upper-first, and detached features. Cost:
    between 0 and 1F. Memory: μ, and a few examples' gradients of one layer at a time. It measures
    first whether examples influence each other, as ``PerExample`` does. Source: the
    ghost norm of Li et al. 2021 (arXiv 2110.05679), ghost dot product of Wang et al. 2024 (arXiv
    2406.11011), here with the direction kept as a matrix.
    """

    per_example: ClassVar[bool] = True
    needs_direction: ClassVar[bool] = True
    second_order: ClassVar[bool] = False

    def backward_pass(self, context: PassContext, total: GradientSum) -> BackwardPass:
        """Return the backward pass under taps."""
        return partial(tapped_backward, context, refusing="Ghost")
