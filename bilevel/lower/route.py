"""What a route is: one way to run the lower pass of a micro-batch, and its products with μ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.random_state import RandomState
from bilevel.lower.gradient_sum import GradientSum
from bilevel.lower.micro_batch import Backward, MicroBatch, PassContext
from bilevel.problem import Batch, Params, Problem, ReweightingProblem
from bilevel.tree import Tree

BackwardPass: TypeAlias = Callable[[Batch, RandomState], Backward]
Product: TypeAlias = Callable[[Tree], Tree]


@dataclass(frozen=True, eq=False)
class DerivativeRequest:
    """What is asked for of ``d/dε (∇_θ L, ∇_φ L)(θ + ε d, φ)`` at ε = 0, on one micro-batch.

    Features of a ``ReweightingProblem`` that are detached are data: neither they nor the weights
    move with θ.

    Attributes:
        problem: The losses.
        micro: What the lower pass left of the micro-batch.
        lower_params: θ.
        upper_params: φ, the very leaves that were given to the lower pass.
        direction: d like θ. None leaves stand still and have no product.
        lower: Whether the θ part is wanted; otherwise it is Nones, and costs nothing.
        upper: Whether the φ part is wanted, likewise.
    """

    problem: Problem
    micro: MicroBatch
    lower_params: Params
    upper_params: Params
    direction: Tree
    lower: bool = True
    upper: bool = True

    @property
    def lower_wanted(self) -> Tree:
        """The direction, with leaves where a product in θ is wanted."""
        return self.direction if self.lower else tree.map(lambda _: None, self.direction)

    @property
    def upper_wanted(self) -> Tree:
        """φ, with leaves where a product in φ is wanted."""
        return self.upper_params if self.upper else tree.map(lambda _: None, self.upper_params)


@runtime_checkable
class Route(Protocol):
    """A frozen dataclass of its settings; ``bilevel.routes`` has those that there are.

    Whatever the route, the gradient of the lower pass is the same up to rounding, and it is
    computed in the same way whether or not a product follows.

    Attributes:
        per_example: Whether it needs per-example losses with detached features.
        needs_direction: Whether it needs μ before the lower pass.
        second_order: Whether it is a way to compute derivatives of the gradient, for hypergradients
            that need them along θ too.
    """

    per_example: ClassVar[bool]
    needs_direction: ClassVar[bool]
    second_order: ClassVar[bool]

    def backward_pass(self, context: PassContext, total: GradientSum) -> BackwardPass:
        """Return what runs the micro-batches of one lower pass, one after the other.

        For a ``ReweightingProblem`` with detached features; for other problems the pass is the same
        whatever the route. Called with autograd on.

        Args:
            context: What all micro-batches have in common.
            total: The sum of their gradients, for routes that add to it leaf by leaf.
        """

    def loss_slopes(
        self,
        problem: ReweightingProblem[Any, Any, Any],
        micro: MicroBatch,
        lower_params: Params,
        direction: Tree,
    ) -> Float[Tensor, " batch"] | None:
        """Return ``⟨μ, ∇ℓ_i⟩ / size``, [size], for detached features; μ like θ.

        Not called where the lower pass has left them (``MicroBatch.dots``).

        None: the route does not take the losses apart, and ``gradient_derivative`` serves.
        """

    def gradient_derivative(self, request: DerivativeRequest) -> Sequence[Tensor | None]:
        """Return the derivative of (∇_θ L, ∇_φ L) along a direction in θ: what is wanted of it."""

    def hessian_product(
        self, problem: Problem, micro: MicroBatch, lower_params: Params, upper_params: Params
    ) -> Product:
        """Return v -> ∇²_θθ L v on one micro-batch, for several v at the same θ."""
