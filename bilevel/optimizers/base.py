"""The protocols of optimizers, their state, and the clip scale that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bilevel.tree import Tree, TreeT

# Hyperparameters by name, as tensors: scalars, one scalar per group, or the two betas of Adam.
Hyperparameters: TypeAlias = Mapping[str, Tree]

CLIP_EPS = 1e-6  # added to the norm, as in torch.nn.utils.clip_grad_norm_


class OptimizerState(NamedTuple):
    """The number of steps (int64 scalar on the CPU) and moments like the parameters, or None.

    All leaves share the number of steps: a step without a gradient of a leaf counts for it, too.
    """

    steps: Int64[Tensor, ""]
    first_moment: Tree
    second_moment: Tree


class UpdateCotangents(NamedTuple):
    """The cotangents of the inputs of an update; ``state`` is like the state, with 0 steps."""

    grads: Tree
    state: OptimizerState
    params: Tree


def clip_scale(norm: Float[Tensor, ""], max_norm: float) -> Float[Tensor, ""]:
    """Return min(1, max_norm / (norm + 1e-6)), the factor of ``clip_grad_norm_``; scalar."""
    return torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)


class Optimizer(Protocol):
    """An optimizer without derivatives, which suffices for the upper level."""

    def init(self, params: Tree) -> Any:
        """Return the state before the first step."""

    def update(self, grads: Tree, state: Any, params: TreeT) -> tuple[TreeT, Any]:
        """Return new parameters and state; a leaf whose gradient is None does not change."""


class DifferentiableOptimizer(Optimizer, Protocol):
    """An optimizer with the derivative of its update, as the lower level needs."""

    def vjp(
        self,
        grads: Tree,
        state: OptimizerState,
        params: Tree,
        params_bar: Tree,
        state_bar: OptimizerState | None = None,
    ) -> UpdateCotangents:
        """Return the cotangents of gradients, state and parameters."""

    def grads_vjp(self, grads: Tree, state: OptimizerState, params: Tree, params_bar: Tree) -> Tree:
        """Return (∂params'/∂grads)ᵀ params_bar."""

    def predicted_grads_vjp(self, state: OptimizerState, params: Tree, params_bar: Tree) -> Tree:
        """Return an approximation of ``grads_vjp`` that does not depend on the gradient."""
