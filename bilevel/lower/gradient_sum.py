"""The gradient of a step, summed in place over its micro-batches.

There is one sum, ``GradientSum``, in one order of operations: leaf by leaf, micro-batch after
micro-batch, so that its bits do not depend on how a gradient reaches it. On a CPU the pages of a
new tensor cost more than the arithmetic on it, and on any device its memory counts, so nothing is
scaled into a copy. What differs is who else holds the gradient, and for how long:

- nobody, after the backward pass: it is added at once and freed, ``add(factor, grads)``;
- the products with μ, until the end of the step: it is added when the mean is asked for, leaf by
  leaf out of the cache, ``add(factor, grads, kept=True)``;
- nobody, not even during the backward pass: each leaf is added, and freed, as autograd hands it
  over, and a whole gradient never exists (``GradientStream``).
"""

from __future__ import annotations

from collections.abc import Callable

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.gradient import as_leaves, dense
from bilevel.autodiff.recomputation import watched_backward
from bilevel.tree import Tree


class GradientSum:
    """Σ_m factor_m g_m, leaf by leaf; None where there was no gradient.

    Args:
        params: Gives structure and precision.
        widen: Sum gradients of 16 bits in float32: in their own precision a sum of many soon
            stands still.
    """

    def __init__(self, params: Tree, *, widen: bool) -> None:
        self.leaves: list[Tensor | None]
        self.leaves, self.structure = optree.tree_flatten(params, none_is_leaf=True)
        self._sums: list[Tensor | None] = [None] * len(self.leaves)
        self._pending: list[tuple[float | Float[Tensor, ""], list[Tensor | None]]] = []
        self._widen = widen

    @torch.no_grad()
    def add(self, factor: float | Float[Tensor, ""], grads: Tree, *, kept: bool = False) -> None:
        """Add ``factor · grads``; the tensors given are not changed.

        Args:
            factor: What the gradient is multiplied by.
            grads: Like the parameters; None leaves are zero.
            kept: Whether somebody holds the tensors anyway. Then they are added when the mean is
                asked for, which holds them until then: each leaf's sum stays in a cache until all
                of them are in it, instead of going to memory and back for every one. Otherwise
                they are added at once and not held.
        """
        if kept:
            self._pending.append((factor, self.structure.flatten_up_to(grads)))
            return
        for index, grad in enumerate(self.structure.flatten_up_to(grads)):
            if grad is not None:
                self.add_leaf(index, factor, grad)

    def add_leaf(
        self, index: int, factor: float | Float[Tensor, ""], grad: Tensor, *, own: bool = False
    ) -> None:
        """Add ``factor · grad`` to one leaf, in the caller's grad mode.

        Args:
            index: The leaf's number.
            factor: What the gradient is multiplied by.
            grad: The gradient of this leaf.
            own: Whether ``grad`` belongs to the sum, which may then be made in its memory.
        """
        if self._widen:
            grad = grad.to(tree.wide_dtype(grad.dtype))
        if isinstance(factor, Tensor):
            # A number where that needs no transfer: it takes a fraction of the time.
            factor = float(factor) if factor.is_cpu else factor.to(grad)
        if isinstance(factor, float) and factor == 0.0 and not torch.isfinite(grad).all():
            grad = torch.zeros_like(grad)  # an example without a part in the step
        old = self._sums[index]
        if old is None:
            self._sums[index] = grad.mul_(factor) if own else grad * factor
        elif isinstance(factor, Tensor):
            old.addcmul_(grad, factor)
        else:
            old.add_(grad, alpha=factor)

    @torch.no_grad()
    def mean(self, count: float) -> Tree:
        """Return the sum over ``count``, in the parameters' precision, and forget it."""
        result = []
        for index, leaf in enumerate(self.leaves):
            for factor, grads in self._pending:
                grad = grads[index]
                if grad is not None:
                    self.add_leaf(index, factor, grad)
            summed, self._sums[index] = self._sums[index], None
            if leaf is not None and summed is not None:
                summed = (summed if count == 1.0 else summed.div_(count)).to(leaf.dtype)
            result.append(summed)
        self._pending.clear()
        averaged: Tree = self.structure.unflatten(result)
        return averaged


class GradientStream:
    """Backward passes whose gradients are used leaf by leaf, as they come, and freed at once.

    Args:
        total: The sum that they are added to.
        direction: μ like the parameters, or None.
    """

    def __init__(self, total: GradientSum, direction: Tree | None) -> None:
        self.params = as_leaves(total.structure.unflatten(total.leaves))
        self._direction = direction
        self._factor: list[Float[Tensor, ""]] = []
        # In the order of ``tree.vdot``.
        self._terms: list[list[Float[Tensor, ""]]] = [[] for _ in total.leaves]
        self._wanted = tree.leaves(self.params)
        along: list[Tensor | None] = [None] * len(total.leaves)
        if direction is not None:
            along = total.structure.flatten_up_to(direction)
        leaves = total.structure.flatten_up_to(self.params)
        for index, (leaf, mu, terms) in enumerate(zip(leaves, along, self._terms, strict=True)):
            if leaf is not None:
                hook = _hook(total, self._factor, index, mu, terms)
                leaf.register_post_accumulate_grad_hook(hook)

    def backward(
        self, factor: Float[Tensor, ""], loss: Float[Tensor, ""]
    ) -> Float[Tensor, ""] | None:
        """Add ``factor · ∇loss`` to the sum, and return ⟨μ, ∇loss⟩, None without μ.

        Args:
            factor: Scalar without a graph.
            loss: Scalar, computed from ``params``.
        """
        self._factor[:] = [factor]
        for terms in self._terms:
            terms.clear()
        if self._wanted and loss.requires_grad:
            watched_backward([loss], self._wanted, accumulate=True)
        if self._direction is None:
            return None
        return tree.total([term for terms in self._terms for term in terms], like=self._direction)


def _hook(
    total: GradientSum,
    factor: list[Float[Tensor, ""]],
    index: int,
    direction: Tensor | None,
    terms: list[Float[Tensor, ""]],
) -> Callable[[Tensor], None]:
    # Knows nothing of the leaf that it hangs on, whose memory a cycle would hold.
    def use(leaf: Tensor) -> None:
        grad, leaf.grad = dense(leaf.grad), None
        assert grad is not None
        if direction is not None:
            terms.extend(tree.dot_terms(grad, direction))
        total.add_leaf(index, factor[0], grad, own=True)  # autograd shares it with nobody

    return use
