"""The derivative of a step with respect to the optimizer's own numbers, so that φ may set them.

``with_hyperparameters`` puts numbers in, and ``hyperparameters_vjp`` returns what a loss after the
step owes to them; ``BilevelSolver`` calls both. Rates and decays are learned by Maclaurin et al.
2015 (arXiv 1502.03492) and Franceschi et al. 2017 (arXiv 1703.01785).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.optimizers.base import Hyperparameters, OptimizerState
from bilevel.optimizers.buckets import map_buckets
from bilevel.optimizers.elementwise import ElementwiseOptimizer
from bilevel.optimizers.point import LeafKey, check_shapes
from bilevel.optimizers.rules import RuleStep, add_decay
from bilevel.tree import Tree


@dataclass(frozen=True)
class LearnableOptimizer(ElementwiseOptimizer):
    """An elementwise optimizer that is differentiable with respect to its hyperparameters."""

    _learnable: ClassVar[tuple[str, ...]] = ()  # those of the rule, beside lr and weight_decay

    def with_hyperparameters(self, values: Hyperparameters) -> Self:
        """Return this optimizer with other numbers: those of tensors that depend on φ.

        Args:
            values: ``lr`` and ``weight_decay`` (scalars, or one for each group), and what the
                class adds: ``momentum`` of SGD, ``betas`` of Adam and AdamW, ``beta`` of RMSProp.

        Raises:
            TypeError: No mapping of names.
            ValueError: No scalar tensors, a name that the class has no derivative for, a schedule
                in the place of a learned rate, or a number out of its range.
        """
        if not isinstance(values, Mapping):
            raise TypeError(
                f"{type(self).__name__}: expected hyperparameters by name, such as {{'lr': "
                f"phi['log_lr'].exp()}}, found a {type(values).__name__}"
            )
        known = ("lr", "weight_decay", *self._learnable)
        for name in values:
            if name not in known:
                raise ValueError(
                    f"{type(self).__name__}: expected hyperparameters among {list(known)}, found "
                    f"{name!r}"
                )
        rates = self.lr.values() if isinstance(self.lr, Mapping) else [self.lr]
        if "lr" in values and any(callable(rate) for rate in rates):
            raise ValueError(
                f"{type(self).__name__}: lr is a schedule, in whose place a learned lr would be "
                "constant; give a number as lr"
            )
        for name, value in values.items():
            for leaf in tree.leaves(value):
                if not isinstance(leaf, Tensor) or (leaf.dim() and name != "betas"):
                    found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                    raise ValueError(
                        f"{type(self).__name__}: expected a scalar tensor as the hyperparameter "
                        f"{name!r}, or one for each group by its name, found {found}; a number "
                        "that does not depend on φ belongs into the optimizer itself"
                    )
        numbers: dict[str, Any] = {name: tree.map(_numbers, v) for name, v in values.items()}
        return replace(self, **numbers)

    def hyperparameters_vjp(
        self,
        values: Hyperparameters,
        grads: Tree,
        state: OptimizerState,
        params: Tree,
        params_bar: Tree,
        state_bar: OptimizerState | None = None,
    ) -> Hyperparameters:
        """Return ``(∂(params', state')/∂h)ᵀ (params_bar, state_bar)`` for hyperparameters h.

        Args:
            values: h, as for ``with_hyperparameters``, whose result this is.
            grads: The argument of ``update``, and so on as for ``vjp``.
            state: The state before the step.
            params: The parameters before the step.
            params_bar: The cotangent of the new parameters.
            state_bar: The cotangent of the new state. None means zero.

        Returns:
            Cotangents like ``values``, without an autograd graph.
        """
        with torch.no_grad():
            at = self._point(grads, state, params)
            bars = self._bars(at, params_bar, state_bar)
            check_shapes(params, at.params, bars[0], "cotangent")
            sums: dict[tuple[str, str], list[Tensor]] = {}

            def rule(
                key: LeafKey,
                p: Tensor,
                g: Tensor,
                m: Tensor | None,
                s: Tensor | None,
                p_bar: Tensor,
                m_bar: Tensor | None,
                s_bar: Tensor | None,
            ) -> tuple[()]:
                p_wide, g_rule = self._rule_inputs(at, key, p, g)
                p_bar = p_bar.to(p_wide.dtype)
                new = self._direction(g_rule, m, s, at.steps)
                given = RuleStep(p_bar * -at.lrs[key.group], m_bar, s_bar)
                step = add_decay(new.step, p_wide, key.decay) if self._decoupled else new.step
                found = {"lr": [-(p_bar * step).sum()]}
                if "weight_decay" in values and key.decay is not None:
                    decayed_bar = given.step
                    if not self._decoupled:
                        decayed_bar = self._direction_vjp(g_rule, m, s, at.steps, given, True).step
                    found["weight_decay"] = [(decayed_bar * p_wide).sum()]
                if self._learnable and not values.keys().isdisjoint(self._learnable):
                    found |= self._learnable_bars(g_rule, m, s, at.steps, new, given)
                for name, terms in found.items():
                    sums.setdefault((name, key.group), []).append(torch.stack(terms).cpu().double())
                return ()

            map_buckets(rule, at.params, at.keys, [at.params, at.grads, *at.moments, *bars], 0)
            return {name: _summed(name, value, sums) for name, value in values.items()}

    def _learnable_bars(
        self,
        g: Tensor,
        m: Tensor | None,
        s: Tensor | None,
        steps: int,
        new: RuleStep,
        bars: RuleStep,
    ) -> dict[str, list[Tensor]]:
        """Return the cotangents of each of ``_learnable``, scalars, from those of a rule's step."""
        raise NotImplementedError


def _numbers(value: Tensor) -> float | tuple[float, ...]:
    found = value.tolist()
    return tuple(found) if isinstance(found, list) else float(found)


def _summed(name: str, value: Tree, sums: Mapping[tuple[str, str], list[Tensor]]) -> Tree:
    """Return the cotangent of a hyperparameter, like its value, from those of the buckets."""

    def total(group: str | None, like: Tree) -> Tree:
        terms = [
            term
            for (of, at), found in sums.items()
            if of == name and group in (None, at)
            for term in found
        ]
        leaves, structure = optree.tree_flatten(like)
        sizes = [leaf.numel() for leaf in leaves]
        found = torch.stack(terms).sum(0) if terms else torch.zeros(sum(sizes))
        parts = zip(found.split(sizes), leaves, strict=True)
        bar: Tree = structure.unflatten([part.view_as(leaf).to(leaf) for part, leaf in parts])
        return bar

    if isinstance(value, Mapping):
        return {group: total(group, one) for group, one in value.items()}
    return total(None, value)
