"""The route by forward-mode derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.finite_difference import moving
from bilevel.autodiff.kernels import forward_mode_loss, kernels_for_transforms
from bilevel.autodiff.second_derivative import RefuseOnceDifferentiable
from bilevel.lower.micro_batch import MicroBatch
from bilevel.lower.route import DerivativeRequest
from bilevel.lower.second_order import put
from bilevel.problem import Params, ReweightingProblem, lower_value
from bilevel.routes.base import PlainBackward
from bilevel.tree import Tree


class ForwardProducts(PlainBackward):
    """Products by forward mode."""

    def loss_slopes(
        self,
        problem: ReweightingProblem[Any, Any, Any],
        micro: MicroBatch,
        lower_params: Params,
        direction: Tree,
    ) -> Float[Tensor, " batch"] | None:
        """Return ``⟨μ, ∇ℓ_i⟩ / size``, [size]."""
        return loss_tangents(problem, micro, lower_params, direction)

    def gradient_derivative(self, request: DerivativeRequest) -> Sequence[Tensor | None]:
        """Return the derivative of the wanted gradients, forward over reverse."""
        return gradient_tangent(request)


@dataclass(frozen=True)
class Jvp(ForwardProducts):
    """Forward-mode derivative of the lower loss along μ, in an extra pass over the batch.

    With detached features ⟨μ, ∇ℓ_i⟩ is the directional derivative of the losses [batch];
    otherwise forward over reverse: the tangent of ∇_φ L. Works for every problem and both orders,
    with any number of examples. Cost: 3F, otherwise up to 9F. Memory: one tangent copy of θ, no
    activations stored (except those that a gradient with respect to φ needs).

    torch's fused attention kernels have no forward-mode derivative; ``bilevel.autodiff.attention``,
    which has the values of its MATH kernel, takes their place.
    """


def loss_tangents(
    problem: ReweightingProblem[Any, Any, Any],
    micro: MicroBatch,
    lower_params: Params,
    direction: Tree,
) -> Float[Tensor, " batch"]:
    """Return the forward-mode derivative of the losses along μ, over the size; [size].

    Zeros if no parameter moves.
    """
    assert micro.losses is not None
    rebuild, primals, tangents = moving(lower_params, direction)
    if not primals:
        return torch.zeros_like(micro.losses) / micro.size

    def losses(*leaves: Tensor) -> Float[Tensor, " batch"]:
        with forward_mode_loss(), random_state.rewound_to(micro.random, lower_params):
            return problem.losses(rebuild(leaves), micro.batch)[0]

    moved = tuple(t.to(p.dtype) for t, p in zip(tangents, primals, strict=True))
    with torch.no_grad(), kernels_for_transforms():
        slopes: Float[Tensor, " batch"] = torch.func.jvp(losses, primals, moved)[1]
        return slopes / micro.size


def gradient_tangent(at: DerivativeRequest) -> Sequence[Tensor]:
    """Return the derivative of the wanted gradients, forward over reverse.

    (Reverse over forward would do, were it right: torch's is silently wrong for ``layer_norm``.)
    """
    rebuild, primals, tangents = moving(at.lower_params, at.direction)
    fixed = tree.map(Tensor.detach, at.upper_params)
    present = tuple(leaf.detach() for leaf in tree.leaves(at.upper_wanted))

    curved = bool(tree.leaves(at.lower_wanted))

    def loss(lower_leaves: Sequence[Tensor], upper_leaves: Sequence[Tensor]) -> Float[Tensor, ""]:
        with (
            RefuseOnceDifferentiable() if curved else nullcontext(),
            forward_mode_loss(),
            random_state.rewound_to(at.micro.random, at.lower_params),
        ):
            upper = put(fixed, upper_leaves) if present else fixed
            return lower_value(at.problem, rebuild(lower_leaves), upper, at.micro.batch)[0]

    wanted: int | tuple[int, int] = 1
    if curved:
        wanted = (0, 1) if present else 0

    def gradient(*lower_leaves: Tensor) -> tuple[Tensor, ...]:
        grads = torch.func.grad(loss, wanted)(lower_leaves, present)
        return (*grads[0], *grads[1]) if wanted == (0, 1) else tuple(grads)

    moved = tuple(t.to(p.dtype) for t, p in zip(tangents, primals, strict=True))
    with torch.no_grad(), kernels_for_transforms():
        derivative: Sequence[Tensor] = torch.func.jvp(gradient, primals, moved)[1]
    return derivative
