"""What stands for the derivative of the update, ∂θ'/∂g, when v is pulled back to the gradient.

``Exact`` is the derivative of the step that was taken. The others are conventions of the
literature, here so that results can be reproduced and their distance from the exact direction
measured (``compare_hypergradients``): both drop the learning rate, the bias correction or the
preconditioner, so that the implicit part of the hypergradient no longer has the scale of its direct
part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.optimizers.base import DifferentiableOptimizer
from bilevel.optimizers.optimizers import SGD, Adam, AdamW
from bilevel.tree import Tree


class UpdateDerivative(Protocol):
    """μ from v; all that ``OneStep`` needs to know of the update."""

    def check(self, optimizer: DifferentiableOptimizer) -> None:
        """Raise ValueError if it does not apply to this optimizer."""

    def pull_back(
        self,
        optimizer: DifferentiableOptimizer,
        grads: Tree | None,
        state: Any,
        params: Tree,
        params_bar: Tree,
    ) -> Tree:
        """Return μ for v = ``params_bar``, both like θ; None leaves are zero.

        ``grads`` and ``state`` are those that the update was, or will be, called with; grads is
        None while the gradient is not known (order upper-first).
        """


@dataclass(frozen=True)
class Exact:
    """The derivative of the update, ``μ = (∂θ'/∂g)ᵀ v``, e.g. −lr v for SGD.

    Before the gradient is known it is what the optimizer predicts (``predicted_grads_vjp``).

    Cost: elementwise.
    """

    def check(self, optimizer: DifferentiableOptimizer) -> None:
        """Accept any optimizer."""

    def pull_back(
        self,
        optimizer: DifferentiableOptimizer,
        grads: Tree | None,
        state: Any,
        params: Tree,
        params_bar: Tree,
    ) -> Tree:
        """Return μ."""
        if grads is None:
            return optimizer.predicted_grads_vjp(state, params, params_bar)
        return optimizer.grads_vjp(grads, state, params, params_bar)


@dataclass(frozen=True)
class Identity:
    """``μ = −v``: no learning rate, no momentum, no preconditioner, no clip.

    For SGD the hypergradient's implicit part is 1/lr times the exact one, with the same direction
    if the learning rate is one for all parameters. For Adam the direction differs too: entries with
    small gradients count for less than the step gives them.

    Source: Betty's ``darts`` (arXiv 2207.02849), which reads the finite difference of DARTS (Liu et
    al. 2019, arXiv 1806.09055) as an implicit derivative with the inverse Hessian taken as the
    identity. With ``CentralDifference(radius=0.01)`` it is what Betty computes, here from copies.
    """

    def check(self, optimizer: DifferentiableOptimizer) -> None:
        """Accept any optimizer."""

    def pull_back(
        self,
        optimizer: DifferentiableOptimizer,
        grads: Tree | None,
        state: Any,
        params: Tree,
        params_bar: Tree,
    ) -> Tree:
        """Return μ; None where there is no gradient."""
        if grads is None:
            return tree.map(torch.neg, params_bar)
        return tree.map(lambda bar, _: -bar, params_bar, grads)


@dataclass(frozen=True)
class Sama:
    """Adam's derivative without its bias correction (Choe et al. 2023, arXiv 2310.05674).

    It is::

        μ = −lr ((1 − β₁) β₂ s − β₁ (1 − β₂) g m) / (√s' + eps)³ · v

    with the moments m, s before the step and s' after it, g being the gradient that Adam saw
    (clipped and, in ``Adam``, decayed; Betty's ``sama`` ignores that decay). The exact factor has
    m' and s' divided by c₁ = 1 − β₁ᵗ and c₂ = 1 − β₂ᵗ: up to eps it is √c₂/c₁ times this one at
    every entry, so the direction is right and the size is not: 4.3 times too large at step 2, 6.5
    at step 10, 1.3 at step 1000 with the default betas. For ``SGD`` μ = −v, as in Betty, without
    the learning rate. An active clip's scale does not enter.

    Cost: that of an optimizer step, elementwise.
    """

    def check(self, optimizer: DifferentiableOptimizer) -> None:
        """Raise ValueError for optimizers that the paper's factor is not defined for."""
        if type(optimizer) not in (SGD, Adam, AdamW):  # their variants have other rules
            raise ValueError(
                f"Sama: defined for Adam, AdamW and SGD, found {type(optimizer).__name__}; choose "
                "update_derivative=Exact(), which is right for every optimizer"
            )
        if isinstance(getattr(optimizer, "lr", None), Mapping):
            raise ValueError(
                "Sama: defined for one learning rate, found one per group; choose "
                "update_derivative=Exact(), which is right for groups"
            )

    def pull_back(
        self,
        optimizer: DifferentiableOptimizer,
        grads: Tree | None,
        state: Any,
        params: Tree,
        params_bar: Tree,
    ) -> Tree:
        """Return μ; None where there is no gradient."""
        if grads is None:
            raise ValueError("Sama: needs the gradient of the lower step (order lower-first)")
        if not isinstance(optimizer, Adam):
            return Identity().pull_back(optimizer, grads, state, params, params_bar)
        beta1, beta2 = optimizer.betas
        assert not isinstance(optimizer.lr, Mapping)
        lr = optimizer.lr(int(state.steps)) if callable(optimizer.lr) else optimizer.lr

        def factor(
            bar: Float[Tensor, "*shape"],
            m: Float[Tensor, "*shape"],
            s: Float[Tensor, "*shape"],
            new_m: Float[Tensor, "*shape"],
            new_s: Float[Tensor, "*shape"],
        ) -> Float[Tensor, "*shape"]:
            seen = (new_m - beta1 * m) / (1.0 - beta1)
            bend = (1.0 - beta1) * beta2 * s - beta1 * (1.0 - beta2) * seen * m
            return (bar.to(s.dtype) * bend / (new_s.sqrt() + optimizer.eps) ** 3 * -lr).to(bar)

        with torch.no_grad():
            _, new = optimizer.update(grads, state, params)
            given = tree.map(lambda bar, _: bar, params_bar, grads)
            return tree.map(
                factor,
                given,
                state.first_moment,
                state.second_moment,
                new.first_moment,
                new.second_moment,
            )
