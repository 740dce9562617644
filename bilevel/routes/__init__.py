"""The ways to compute the mixed product ∂/∂φ ⟨∇_θ L(θ, φ), μ⟩, as objects to choose from.

All give the same numbers (``CentralDifference`` up to its own error); they differ in what they ask
of the problem and in cost. F is a forward pass of the lower model on the batch.

All work with 16-bit parameters and under ``torch.autocast``, around the solver's step or inside the
loss, in both orders. On the multilayer perceptron, transformers and convolutions of the tests the
hypergradient is within 1.1 % of that in float64 for bfloat16 parameters or autocast, and within
0.2 % for float16, ``CentralDifference`` included. Give the lower optimizer
``state_dtype=torch.float32`` then. In float16, v, the lower gradient and μ = −lr v lose what is
below 6e-8; there is no loss scaling here.

Beware of Adam in 16 bits with order lower-first: where an entry's gradient cancels to exactly 0 and
its second moment is 0 still (a token seen for the first time), the derivative of the step taken is
(1 − β₁) lr / ((1 − β₁ᵗ) eps), thousands of times that of its neighbours, and rounding decides. One
such entry can outweigh the rest of μ. Order upper-first is free of it.
"""

from __future__ import annotations

from bilevel.lower.route import Route
from bilevel.routes.auto import Auto
from bilevel.routes.central_difference import CentralDifference
from bilevel.routes.dot import Dot
from bilevel.routes.ghost import Ghost
from bilevel.routes.jvp import Jvp
from bilevel.routes.per_example import PerExample
from bilevel.routes.reverse import Reverse

__all__ = ["Auto", "CentralDifference", "Dot", "Ghost", "Jvp", "PerExample", "Reverse", "Route"]
