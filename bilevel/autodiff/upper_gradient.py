"""The upper loss and its first derivatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.autodiff.gradient import as_leaves, gradients
from bilevel.problem import Batch, Params, Problem, detached, upper_value
from bilevel.tree import Tree


class UpperGradient(NamedTuple):
    """Upper loss and its gradients: v with respect to θ, and the direct one, to φ; its aux."""

    loss: Tensor
    lower: Tree
    direct: Tree
    aux: Any = None


def upper_gradient(
    problem: Problem, lower_params: Params, upper_params: Params, batch: Batch
) -> UpperGradient:
    """Return the upper loss with its gradients with respect to θ and φ.

    Raises:
        ValueError: The loss is not a scalar.
    """
    with torch.enable_grad():
        lower, upper = as_leaves(lower_params), as_leaves(upper_params)
        loss, aux = upper_value(problem, lower, upper, batch)
        found_lower, direct = gradients([loss], (lower, upper))
    return UpperGradient(loss.detach(), found_lower, direct, detached(aux))
