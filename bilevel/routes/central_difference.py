"""The route by central differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.finite_difference import central_difference
from bilevel.autodiff.gradient import as_leaves, gradients
from bilevel.autodiff.stop_gradients import StopGradients, watched
from bilevel.checks import require
from bilevel.lower.micro_batch import MicroBatch
from bilevel.lower.route import DerivativeRequest
from bilevel.lower.second_order import chosen, zeros_for_none
from bilevel.problem import (
    Batch,
    Params,
    ReweightingProblem,
    is_separable,
    lower_value,
    weighted_mean,
)
from bilevel.routes.base import PlainBackward
from bilevel.tree import Tree


@dataclass(frozen=True)
class CentralDifference(PlainBackward):
    """Two plain passes at θ ± ε μ, for models without a forward-mode derivative.

    Attention keeps its fused kernels. θ is not touched, not even in its last bit: the shifted
    parameters are new tensors. Both passes see the same random numbers, and what autograd treats
    as constants (``.detach()``, ``.item()``, everything under ``torch.no_grad``) as it is at θ. A μ
    that is not finite makes the product NaN without an evaluation, and the solver then skips the
    upper update.

    A difference knows nothing of a custom ``autograd.Function`` whose backward is not the
    derivative of its forward (a straight-through estimator, a reversed gradient): where the loss
    has one a warning says so, and ``Reverse`` is right. Constants within activation checkpointing
    are held in the forward pass alone.

    Cost: 2F with detached features; 1F more if the loss computes in less precision than its
    parameters have, and 3F more if its constants depend on θ. Memory: one copy of θ, in float32,
    and the activations of a forward pass.

    Args:
        relative_step: ``ε ‖μ‖ / ‖θ‖``; None: a tenth of the cube root of the machine epsilon of the
            least precise number involved, within the loss too: 6e-7 in float64, 5e-4 in float32,
            0.02 in bfloat16.
        radius: ``ε ‖μ‖`` itself, in place of ``relative_step``. Betty's rule (``darts_alpha``,
            ``sama_adam_alpha``): 0.01, whatever the size of θ and its precision.
        widen: Shift float32 copies of 16-bit parameters, hand the loss these and its batch in
            float32, and switch autocast off, wherever it is on: the error is then that of float32.
            Needs a loss that computes in the precision of what it is given; one that has 16-bit
            weights of its own says so by an error. False: shift in the parameters' own precision
            (that of an autocast, if one is on), by as much more as it is coarser; rounding of the
            shifted copies and of the loss then leaves an error of 1 to 4 % in bfloat16 on the
            models of the tests, and more for a μ along which the losses hardly change.

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

    def loss_slopes(
        self,
        problem: ReweightingProblem[Any, Any, Any],
        micro: MicroBatch,
        lower_params: Params,
        direction: Tree,
    ) -> Float[Tensor, " batch"] | None:
        """Return ``⟨μ, ∇ℓ_i⟩ / size``, [size], from the losses on both sides."""
        assert micro.losses is not None

        def losses(
            params: Params, batch: Batch, watch: StopGradients
        ) -> tuple[Float[Tensor, " batch"]]:
            with torch.enable_grad(), random_state.rewound_to(micro.random, lower_params):
                return (_losses(problem, as_leaves(params), batch, watch).detach(),)

        like = (micro.losses,)
        with torch.no_grad():
            (slopes,) = central_difference(self, losses, lower_params, direction, micro.batch, like)
            return slopes / micro.size

    def gradient_derivative(self, request: DerivativeRequest) -> Sequence[Tensor | None]:
        """Return the difference of two gradients at θ ± ε d: 6F, and the memory of one.

        In float32 or wider whatever the precision of θ, unless ``widen`` is off.
        """
        if is_separable(request.problem):
            return _separable_difference(self, request)
        return _gradient_difference(self, request)


def _gradient_difference(
    route: CentralDifference, at: DerivativeRequest
) -> Sequence[Tensor | None]:
    def gradient(
        params: Params, inputs: tuple[Params, Batch], watch: StopGradients
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad(), random_state.rewound_to(at.micro.random, at.lower_params):
            params, upper = as_leaves(params), as_leaves(inputs[0])
            loss, _ = lower_value(watched(at.problem, watch), params, upper, inputs[1])
            wanted = [*chosen(params, at.lower_wanted), *chosen(upper, at.upper_wanted)]
            return zeros_for_none(gradients([loss], wanted), wanted)

    like = [*chosen(at.lower_params, at.lower_wanted), *tree.leaves(at.upper_wanted)]
    inputs = tree.map(Tensor.detach, at.upper_params), at.micro.batch
    return central_difference(route, gradient, at.lower_params, at.direction, inputs, like)


def _separable_difference(
    route: CentralDifference, at: DerivativeRequest
) -> Sequence[Tensor | None]:
    """Return the same for detached features.

    For the θ part with the weights of the pass, which θ does not move; for the φ part their own
    derivative times that of the losses: they must have their graph to φ.
    """
    problem = at.problem
    assert isinstance(problem, ReweightingProblem)
    assert at.micro.weights is not None
    assert at.micro.losses is not None
    weights = at.micro.weights.detach()

    def values(params: Params, batch: Batch, watch: StopGradients) -> tuple[Tensor, ...]:
        with torch.enable_grad(), random_state.rewound_to(at.micro.random, at.lower_params):
            params = as_leaves(params)
            losses = _losses(problem, params, batch, watch)
            wanted = chosen(params, at.lower_wanted)
            grads = gradients([weighted_mean(weights, losses)], wanted)
        return (*zeros_for_none(grads, wanted), losses.detach())

    like = [*chosen(at.lower_params, at.lower_wanted), at.micro.losses]
    *products, slopes = central_difference(
        route, values, at.lower_params, at.direction, at.micro.batch, like
    )
    cotangent = (slopes / at.micro.size).to(at.micro.weights.dtype)
    return [*products, *gradients([at.micro.weights], tree.leaves(at.upper_wanted), [cotangent])]


def _losses(
    problem: ReweightingProblem[Any, Any, Any],
    params: Params,
    batch: Batch,
    watch: StopGradients,
) -> Float[Tensor, " batch"]:
    """Return the losses alone: features are not constants of theirs."""
    alone = replace(problem, detach_features=False)
    return watched(alone, watch).losses(params, batch)[0]
