"""The ways to compute the mixed product ∂/∂φ ⟨∇_θ L(θ, φ), μ⟩, as objects to choose from.

All give the same numbers (`CentralDifference` up to its own error); they differ in what they ask
of the problem and in cost. F is a forward pass of the lower model on the batch.

All work with 16-bit parameters and under `torch.autocast`, around the solver's step or inside the
loss, in both orders. On the multilayer perceptron, transformers and convolutions of the tests the
hypergradient is within 1.1 % of that in float64 for bfloat16 parameters or autocast, and within
0.2 % for float16, `CentralDifference` included. Give the lower optimizer
``state_dtype=torch.float32`` then. In float16, v, the lower gradient and μ = −lr v lose what is
below 6e-8; there is no loss scaling here.

Beware of Adam in 16 bits with order lower-first: where an entry's gradient cancels to exactly 0 and
its second moment is 0 still (a token seen for the first time), the derivative of the step taken is
(1 − β₁) lr / ((1 − β₁ᵗ) eps), thousands of times that of its neighbours, and rounding decides. One
such entry can outweigh the rest of μ. Order upper-first is free of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from bilevel.checks import require


@dataclass(frozen=True)
class Auto:
    """The cheapest exact route that applies, decided micro-batch by micro-batch.

    For a `ReweightingProblem` with detached features: `Dot` for single examples, else `Ghost`
    (order upper-first) or `PerExample` (lower-first), else, if the model uses a parameter in a
    way these have no rule for, `Jvp`, and `StepInfo.notes` says why. For everything else `Jvp`.
    """


@dataclass(frozen=True)
class Dot:
    """⟨μ, ∇ℓ⟩ with the gradient that the lower backward pass computes anyway.

    For micro-batches of one example and detached features. The backward pass runs on the plain
    loss and its gradient is then scaled by the weight, so a weight of 0 is no special case.
    Cost: one dot product. Memory: none for one micro-batch or order upper-first; a copy of the
    gradients per micro-batch for lower-first.
    """


@dataclass(frozen=True)
class Ghost:
    """⟨μ, ∇ℓ_i⟩ of all examples from the activations and output gradients of one backward pass.

    For a linear layer with input a and output gradient b, ``⟨μ_W, ∇_W ℓ_i⟩ = Σ_tokens b·(μ_W a)``,
    and similarly for biases, scales, embeddings and convolutions: see `bilevel.lower.ghost`. Needs
    μ before the lower backward pass, hence order upper-first, and detached features. Cost: between
    0 and 1F. Memory: μ, and a few examples' gradients of one layer at a time. Source: the ghost
    norm of Li et al. 2021 (arXiv 2110.05679), ghost dot product of Wang et al. 2024 (arXiv
    2406.11011), here with the direction kept as a matrix.
    """


@dataclass(frozen=True)
class PerExample:
    """As `Ghost`, for μ that is known only after the lower step (order lower-first).

    What the products need is kept until then: per-example gradients, or activations and output
    gradients where these are smaller. Memory: up to batch × θ, for every micro-batch of the step.

    Args:
        entries_limit: Per-example gradients of a linear layer with more entries than this (batch
            times weight) are not kept; its activations and output gradients are.
    """

    entries_limit: int = 1 << 26

    def __post_init__(self) -> None:
        require(self, "entries_limit", self.entries_limit)


@dataclass(frozen=True)
class Jvp:
    """Forward-mode derivative of the lower loss along μ, in an extra pass over the batch.

    With detached features ⟨μ, ∇ℓ_i⟩ is the directional derivative of the losses [batch];
    otherwise forward over reverse: the tangent of ∇_φ L. Works for every problem and both orders,
    with any number of examples. Cost: 3F, otherwise up to 9F. Memory: one tangent copy of θ, no
    activations stored (except those that a gradient with respect to φ needs).

    torch's fused attention kernels have no forward-mode derivative; `bilevel.autodiff.attention`,
    which has the values of its MATH kernel, takes their place.
    """


@dataclass(frozen=True)
class Reverse:
    """Double backward: ∇_θ L with a graph, then its vector-Jacobian product. The reference.

    Cost: 5F and more. Memory: 3 to 4 times the activations. Attention runs with its MATH kernel.
    """


@dataclass(frozen=True)
class CentralDifference:
    """Two plain passes at θ ± ε μ, for models without a forward-mode derivative.

    Attention keeps its fused kernels. θ is not touched, not even in its last bit: the shifted
    parameters are new tensors. Both passes see the same random numbers. A μ that is not finite
    makes the product NaN without an evaluation, and the solver then skips the upper update.

    Cost: 2F with detached features. Memory: one copy of θ, in float32.

    Args:
        relative_step: ``ε ‖μ‖ / ‖θ‖``; None: a tenth of the cube root of the machine epsilon of the
            least precise number involved: 6e-7 in float64, 5e-4 in float32, 0.02 in bfloat16.
        radius: ``ε ‖μ‖`` itself, in place of `relative_step`. Betty's rule (``darts_alpha``,
            ``sama_adam_alpha``): 0.01, whatever the size of θ and its precision.
        widen: Shift float32 copies of 16-bit parameters, hand the loss these and its batch in
            float32, and switch autocast off, wherever it is on: the error is then that of float32.
            Needs a loss that computes in the precision of what it is given; one that has 16-bit
            weights of its own says so by an error. False: shift in the parameters' own precision
            (that of an autocast, if one is on around the solver's step), by as much more as it is
            coarser; rounding of the shifted copies and of the loss then leaves an error of 1 to
            4 % in bfloat16 on the models of the tests, and more for a μ along which the losses
            hardly change. If the loss enters autocast itself, pass its relative_step.

    Raises:
        ValueError: A step that is not positive, or both of them.
    """

    relative_step: float | None = None
    radius: float | None = None
    widen: bool = True

    def __post_init__(self) -> None:
        for name in ("relative_step", "radius"):
            if getattr(self, name) is not None:
                require(self, name, getattr(self, name), low_open=True)
        if self.relative_step is not None and self.radius is not None:
            raise ValueError(
                f"CentralDifference: relative_step={self.relative_step} and radius={self.radius} "
                "both set the step; give one of them"
            )


Route: TypeAlias = Auto | Dot | Ghost | PerExample | Jvp | Reverse | CentralDifference
