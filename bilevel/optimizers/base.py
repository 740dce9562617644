"""What an optimizer is, its state, and the clip scale that all of them share."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bilevel.tree import Tree, TreeT

CLIP_EPS = 1e-6  # added to the norm, as in torch.nn.utils.clip_grad_norm_


class OptimizerState(NamedTuple):
    """Steps taken (int64 scalar, kept on the CPU) and moments like the parameters, or None.

    They are common to all leaves: a step in which a leaf has no gradient counts for it too.
    """

    steps: Int64[Tensor, ""]
    first_moment: Tree
    second_moment: Tree


class UpdateCotangents(NamedTuple):
    """Cotangents of the inputs of an update; ``state`` has its structure, with 0 steps."""

    grads: Tree
    state: OptimizerState
    params: Tree


def clip_scale(norm: Float[Tensor, ""], max_norm: float) -> Float[Tensor, ""]:
    """Return min(1, max_norm / (norm + 1e-6)), the factor of ``clip_grad_norm_``; scalar."""
    return torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)


class Optimizer(Protocol):
    """Anything that takes steps; all that the upper level needs."""

    def init(self, params: Tree) -> Any:
        """Return the state before the first step."""

    def update(self, grads: Tree, state: Any, params: TreeT) -> tuple[TreeT, Any]:
        """Return new parameters and state; a leaf whose gradient is None stays as it is."""


class DifferentiableOptimizer(Optimizer, Protocol):
    """An optimizer that knows the derivative of its update; needed at the lower level."""

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
        """Return ``grads_vjp`` as far as it is known before the gradient is."""
