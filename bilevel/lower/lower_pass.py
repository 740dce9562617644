"""Forward and backward pass of the lower loss over the micro-batches of a step.

Whatever the route, the gradient is that of Σ_m (n_m/N) · lower_loss(batch_m), n_m being the
examples of micro-batch m and N all of them, so that micro-batches make up one batch exactly. A
route computes its gradient in the same way whether or not an upper update follows; with weights
that are all exactly 1 it does so by autograd's own kernels, which is plain training bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.random_state import RandomState
from bilevel.lower.gradient_sum import GradientStream, GradientSum
from bilevel.lower.micro_batch import (
    MicroBatch,
    Run,
    run_attached,
    run_detached,
    run_scalar,
    run_single,
    run_streamed,
)
from bilevel.lower.tapped import run_tapped
from bilevel.problem import Batch, Params, Problem, ReweightingProblem
from bilevel.routes import Auto, Dot, Ghost, PerExample, Route
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class LowerPass:
    """Gradient of the step (None leaves: no gradient) and its micro-batches."""

    grads: Tree
    micro_batches: list[MicroBatch]
    norm: Tensor | None = None

    @cached_property
    def grad_norm(self) -> Tensor:
        """Norm of the gradient, scalar; also of a summary, which has no gradient any more."""
        return tree.norm(self.grads) if self.norm is None else self.norm

    def summary(self) -> LowerPass:
        """Return the figures alone: no gradients, no batches, no graphs; a few numbers."""
        return LowerPass(
            None, [micro.summary() for micro in self.micro_batches], self.grad_norm.detach()
        )

    @property
    def shares(self) -> list[float]:
        """Each micro-batch's share n_m / N of the examples."""
        total = sum(micro.size for micro in self.micro_batches)
        return [micro.size / total for micro in self.micro_batches]


def lower_pass(
    problem: Problem,
    route: Route,
    lower_params: Params,
    upper_params: Params,
    batches: Sequence[Batch],
    *,
    differentiate: bool = False,
    direction: Tree | None = None,
) -> LowerPass:
    """Run all micro-batches.

    Args:
        problem: The losses.
        route: How the mixed product will be computed.
        lower_params: θ; not changed.
        upper_params: φ, requiring grad if a mixed product will be asked for.
        batches: The micro-batches.
        differentiate: Whether a mixed product will be asked for.
        direction: μ, if it is known already.

    Raises:
        Refusal: The route is `Ghost` or `PerExample`, and a parameter is used in a way that has
            no per-example rule.
        ValueError: The route is `Dot` and a micro-batch has several examples.
    """
    run = Run(problem, route, lower_params, upper_params, differentiate, direction)
    runner = _runner(problem, route)
    total = GradientSum(lower_params, widen=len(batches) > 1)
    stream = None
    if runner is run_single and (direction is not None or not differentiate):
        stream = GradientStream(total, direction if differentiate else None)
    micro_batches: list[MicroBatch] = []
    for batch in batches:
        random = random_state.capture(lower_params)
        with torch.enable_grad():
            if stream is not None:  # one example in each, so all have the same share
                micro_batches.append(run_streamed(run, batch, random, stream))
                continue
            grads, micro = runner(run, batch, random)
        micro_batches.append(micro)
        if len(batches) == 1 and micro.factor is None:
            return LowerPass(grads, micro_batches)
        if not micro.size:
            raise ValueError("batch_size: expected at least 1 example per micro-batch, found 0")
        relative = micro.size / micro_batches[0].size
        factor = relative if micro.factor is None else micro.factor * relative
        if runner is run_single:  # keeps it for the products with μ
            total.add_later(factor, grads)
        else:
            total.add(factor, grads)
        del grads
    relative = sum(micro.size for micro in micro_batches) / micro_batches[0].size
    return LowerPass(total.mean(relative), micro_batches)


def _runner(
    problem: Problem, route: Route
) -> Callable[[Run, Batch, RandomState], tuple[Tree, MicroBatch]]:
    if not isinstance(problem, ReweightingProblem):
        return run_scalar
    if not problem.detach_features:
        return run_attached
    if isinstance(route, Dot):
        return run_single
    if isinstance(route, Auto | Ghost | PerExample):
        return run_tapped
    return run_detached
