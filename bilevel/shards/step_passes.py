"""The passes of a step in place: over the examples of all ranks, and the shards of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.gradient import UpperGradient, upper_gradient
from bilevel.lower.lower_pass import LowerPass, lower_pass
from bilevel.lower.route import Route
from bilevel.lower.steps import Window
from bilevel.problem import Batch, Params
from bilevel.shards import passes
from bilevel.shards.collective import Shards
from bilevel.tree import Tree


def step_pass(
    window: Window,
    route: Route,
    lower_params: Params,
    upper_params: Params,
    batches: Sequence[Batch],
    *,
    differentiate: bool = False,
    direction: Tree | None = None,
    keep_graph: bool = False,
) -> LowerPass:
    """Run the lower pass of a step; the arguments are those of ``lower_pass``."""
    if isinstance(window.collective, Shards):
        return passes.lower_pass(
            window.collective, window.problem, lower_params, upper_params, batches, direction
        )
    return lower_pass(
        window.problem,
        route,
        lower_params,
        upper_params,
        batches,
        differentiate=differentiate,
        direction=direction,
        keep_graph=keep_graph,
        collective=window.collective,
        guard=window.guard,
    )


def upper_pass(window: Window, lower_params: Params, batch: Batch) -> UpperGradient:
    """Return the upper loss and its gradients at θ."""
    upper_params = window.upper_params
    if isinstance(window.collective, Shards):
        return passes.upper_gradient(
            window.collective, window.problem, lower_params, upper_params, batch
        )
    return upper_gradient(window.problem, lower_params, upper_params, batch, window.collective)


def norm_over_ranks(window: Window, values: Tree) -> Float[Tensor, ""]:
    """Return the norm of a tree like θ, of all shards."""
    if isinstance(window.collective, Shards):
        return window.collective.norm(values)
    return tree.norm(values)
