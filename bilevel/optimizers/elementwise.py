"""One optimizer step and its exact transposed derivative, for any elementwise rule.

For every leaf θ with gradient g (of all leaves together for the clip scale c)::

    g₁ = c g                   c = min(1, max_norm / (‖g‖ + 1e-6)), or 1 without max_norm
    g₂ = g₁ + λ θ              L2 weight decay, or
    u, moments' = rule(g₂, moments)    (without L2 decay g₂ = g₁)
    θ' = θ − lr (u + λ θ)      decoupled weight decay

The optimizers in ``optimizers`` add the rule and its hyperparameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import require
from bilevel.optimizers.base import OptimizerState, UpdateCotangents, clip_scale
from bilevel.optimizers.buckets import map_buckets
from bilevel.optimizers.groups import GroupRates, GroupValues, check_groups, groups_of, of_group
from bilevel.optimizers.point import (
    LeafKey,
    Leaves,
    UpdatePoint,
    add_scale_path,
    check_shapes,
    column,
    or_else,
    update_point,
    zero_filled,
)
from bilevel.optimizers.rules import RuleStep, add_decay, descend
from bilevel.tree import Tree, TreeT


@dataclass(frozen=True)
class ElementwiseOptimizer:
    """The parts that all optimizers share: clipping, weight decay, learning rate and state.

    Args:
        lr: The learning rate, or a function from the number of earlier steps to it. With groups
            also a mapping from each group's name to either.
        weight_decay: The weight decay λ of the module's equations. With groups also a mapping from
            each group's name to it.
        decay_mask: The function from a leaf's path to whether the leaf decays, for example
            ``lambda name: not name.endswith("bias")``. Paths are joined by '/' (see
            ``tree.names``); in a flat dict they are the parameters' names. None means that all
            leaves decay.
        group: The function from a leaf's path to the name of its group, as torch has parameter
            groups: ``AdamW({"head": 1e-3, "body": 1e-5}, group=lambda name: name.split(".")[0])``.
            None means that there is one group.
        max_norm: The largest norm of all gradients together. None means no clipping.
        differentiate_clip: Whether derivatives include that of the clip scale c.
        state_dtype: The dtype of the moments and of the arithmetic. None means that of the
            parameters. Use float32 with 16-bit parameters: in bfloat16, 0.999 s rounds to s, so
            that a second moment with β₂ = 0.999 never decays. The new parameters are still rounded
            to their dtype, so a step below half a unit in the last place of a parameter is lost.
    """

    lr: GroupRates
    _: KW_ONLY
    weight_decay: GroupValues = 0.0
    decay_mask: Callable[[str], bool] | None = None
    group: Callable[[str], str] | None = None
    max_norm: float | None = None
    differentiate_clip: bool = False
    state_dtype: torch.dtype | None = None

    _decoupled: ClassVar[bool] = False
    _predicts_from_first: ClassVar[bool] = False  # whether _predicted_gain looks at m

    def __post_init__(self) -> None:
        check_groups(self, "lr", self.lr, self.group)
        check_groups(self, "weight_decay", self.weight_decay, self.group)
        if self.max_norm is not None:
            require(self, "max_norm", self.max_norm, low_open=True)

    def init(self, params: Tree) -> OptimizerState:
        """Return the state before the first step: 0 steps and zero moments.

        Moments have the dtype of their parameter, or ``state_dtype``; the update is computed in
        that dtype, too, and the new parameters are rounded to their own.
        """
        has_first, has_second = self._moments()
        return OptimizerState(
            steps=torch.zeros((), dtype=torch.int64, device="cpu"),
            first_moment=tree.zeros_like(params, dtype=self.state_dtype) if has_first else None,
            second_moment=tree.zeros_like(params, dtype=self.state_dtype) if has_second else None,
        )

    def update(
        self, grads: Tree, state: OptimizerState, params: TreeT
    ) -> tuple[TreeT, OptimizerState]:
        """Take one step, in the caller's grad mode (train under ``torch.no_grad``).

        Args:
            grads: The gradients, like ``params``. A leaf whose gradient is None keeps its value and
                its moments.
            state: The state from ``init`` or the previous ``update``.
            params: The parameters, tensors of any shape and float dtype.

        Returns:
            The new parameters and the new state. The old ones are not changed.

        Raises:
            ValueError: ``grads`` or ``state`` differ from ``params`` in structure or shape.
        """
        at = self._point(grads, state, params)

        def rule(
            key: LeafKey, p: Tensor, g: Tensor, m: Tensor | None, s: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            p_wide, g_rule = self._rule_inputs(at, key, p, g)
            step, m_new, s_new = self._direction(g_rule, m, s, at.steps)
            if self._decoupled:
                step = add_decay(step, p_wide, key.decay)
            return descend(p_wide, step, at.lrs[key.group]).to(p.dtype), m_new, s_new

        new = map_buckets(rule, at.params, at.keys, [at.params, at.grads, *at.moments], 3)
        new_params, *moments = or_else(new, [at.params, *at.moments])
        return at.structure.unflatten(new_params), self._state(at, state.steps + 1, moments)

    def vjp(
        self,
        grads: Tree,
        state: OptimizerState,
        params: Tree,
        params_bar: Tree,
        state_bar: OptimizerState | None = None,
    ) -> UpdateCotangents:
        """Return the transposed derivative of ``update`` at (grads, state, params).

        The clip scale is constant unless ``differentiate_clip``. Where the second moment after the
        step is 0, its derivative does not exist, and 0 is used (see ``rules``).

        Args:
            grads: The argument of ``update``.
            state: The argument of ``update``, the state before the step.
            params: The argument of ``update``.
            params_bar: The cotangent of the new parameters. None leaves are zero.
            state_bar: The cotangent of the new state, whose steps are ignored. None means zero.

        Returns:
            The cotangents ``(∂(params', state')/∂x)ᵀ (params_bar, state_bar)`` for x = grads,
            state and params, without an autograd graph. A leaf whose gradient is None has None as
            cotangent of its gradient.
        """
        with torch.no_grad():
            at = self._point(grads, state, params)
            bars = self._bars(at, params_bar, state_bar)
            check_shapes(params, at.params, bars[0], "cotangent")
            grads_bar, *others = self._pull_back(at, bars, all_inputs=True)
            new_bars, *moment_bars = or_else(others, bars)
        return UpdateCotangents(
            grads=at.structure.unflatten(grads_bar),
            state=self._state(at, torch.zeros_like(state.steps), moment_bars),
            params=at.structure.unflatten(new_bars),
        )

    def grads_vjp(self, grads: Tree, state: OptimizerState, params: Tree, params_bar: Tree) -> Tree:
        """Return ``(∂params'/∂grads)ᵀ params_bar``, which is ``−lr · params_bar`` for plain SGD.

        This is the part of ``vjp`` for the gradients, at lower cost. Arguments and conventions are
        those of ``vjp``.
        """
        with torch.no_grad():
            at = self._point(grads, state, params)
            nothing: Leaves = [None] * len(at.params)
            bars = [zero_filled(at.structure, params_bar, at.params), nothing, nothing]
            check_shapes(params, at.params, bars[0], "cotangent")
            pulled: Tree = at.structure.unflatten(self._pull_back(at, bars, all_inputs=False)[0])
            return pulled

    def predicted_grads_vjp(self, state: OptimizerState, params: Tree, params_bar: Tree) -> Tree:
        """Return an approximation of ``grads_vjp`` that does not depend on the step's gradient.

        It is exact for SGD. The adaptive optimizers use the second moment in ``state``,
        bias-corrected by the steps before, and omit the term in which the gradient changes its own
        second moment. Entries whose second moment is 0 or negligible beside eps, which are all
        entries in a cold state, get ``−lr · params_bar``: their exact factor may be anything from
        nearly 0 to lr / eps, depending on the next gradient. The clip scale is assumed to be 1.
        None leaves of ``params_bar`` remain None.
        """
        with torch.no_grad():
            structure = optree.tree_structure(params, none_is_leaf=True)
            leaves = structure.flatten_up_to(params)
            p_bars = structure.flatten_up_to(params_bar)
            check_shapes(params, leaves, p_bars, "cotangent")
            first = state.first_moment if self._predicts_from_first else None
            firsts = column(structure, first, len(leaves))
            seconds = column(structure, state.second_moment, len(leaves))
            count = int(state.steps)
            groups = groups_of(params, len(leaves), self.group)
            lrs = self._lrs(count, groups)

            def rule(
                key: tuple[Any, ...], bar: Tensor, m: Tensor | None, s: Tensor | None
            ) -> tuple[Tensor]:
                gain, lr = self._predicted_gain(m, s, count), lrs[key[-1]]
                if not isinstance(gain, Tensor):
                    return (bar * (gain * -lr),)
                # In place, since the pages of a new tensor cost more on a CPU than the arithmetic.
                return (gain.mul_(bar).mul_(-lr).to(bar.dtype),)

            keys = [
                None if bar is None else (bar.dtype, bar.device, group)
                for bar, group in zip(p_bars, groups, strict=True)
            ]
            columns = map_buckets(rule, leaves, keys, [p_bars, firsts, seconds], 1)
            predicted: Tree = structure.unflatten(columns[0])
            return predicted

    @property
    def predicts_from(self) -> tuple[bool, bool]:
        """Whether ``predicted_grads_vjp`` looks at the first moment, and at the second."""
        first, second = self._moments()
        return first and self._predicts_from_first, second

    @property
    def is_blind_when_cold(self) -> bool:
        """Whether the first step hardly depends on the size of the gradient, only on its sign."""
        return False

    # A subclass defines the moments that it keeps, its rule, and the rule's derivative.

    def _moments(self) -> tuple[bool, bool]:
        raise NotImplementedError

    def _direction(self, g: Tensor, m: Tensor | None, s: Tensor | None, steps: int) -> RuleStep:
        raise NotImplementedError

    def _direction_vjp(
        self,
        g: Tensor,
        m: Tensor | None,
        s: Tensor | None,
        steps: int,
        bars: RuleStep,
        all_inputs: bool,
    ) -> RuleStep:
        raise NotImplementedError

    def _predicted_gain(self, m: Tensor | None, s: Tensor | None, count: int) -> float | Tensor:
        raise NotImplementedError

    # Helpers of all optimizers.

    def _lrs(self, count: int, groups: Sequence[str]) -> dict[str, float | Tensor]:
        """Return the learning rate of each group at the step after so many."""
        lrs: dict[str, float | Tensor] = {}
        for group in dict.fromkeys(groups):
            lr = of_group(self, "lr", self.lr, group)
            lrs[group] = lr(count) if callable(lr) else lr
        return lrs

    def _keys(self, params: Tree, leaves: Leaves, grads: Leaves) -> list[LeafKey | None]:
        """Return a key for each leaf that has a gradient."""
        groups = groups_of(params, len(leaves), self.group)
        decays = [True] * len(leaves)
        if self.decay_mask is not None:
            decays = [self.decay_mask(name) for name in tree.names(params, none_is_leaf=True)]
        keys: list[LeafKey | None] = [None] * len(leaves)
        for index, (p, g) in enumerate(zip(leaves, grads, strict=True)):
            if p is not None and g is not None:
                group = groups[index]
                decay = of_group(self, "weight_decay", self.weight_decay, group)
                decay = decay if decays[index] else None
                keys[index] = LeafKey(p.dtype, g.dtype, p.device, decay, group)
        return keys

    def _point(self, grads: Tree, state: OptimizerState, params: Tree) -> UpdatePoint:
        if [kept is not None for kept in state[1:]] != [*self._moments()]:
            raise ValueError(
                f"{type(self).__name__}: the state is that of another optimizer, or of other "
                "hyperparameters: it has other moments; start from init"
            )
        at = update_point(grads, state, params)
        keys = self._keys(params, at.params, at.grads)
        groups = [key.group for key in keys if key is not None]
        at = at._replace(keys=keys, lrs=self._lrs(int(state.steps), groups))
        if self.max_norm is None:
            return at
        norm = tree.norm(grads) if self.differentiate_clip else tree.norm(grads).detach()
        return at._replace(norm=norm, scale=clip_scale(norm, self.max_norm))

    def _rule_inputs(
        self, at: UpdatePoint, key: LeafKey, p: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return parameters and clipped, L2-decayed gradients in the dtype of the update."""
        dtype = self.state_dtype or p.dtype
        p, g = p.to(dtype), g.to(dtype)
        if at.scale is not None:
            g = g * at.scale.to(g)
        return p, g if self._decoupled else add_decay(g, p, key.decay)

    def _bars(
        self, at: UpdatePoint, params_bar: Tree, state_bar: OptimizerState | None
    ) -> list[Leaves]:
        """Return the cotangents of new parameters and moments, zeros in place of None."""
        first_bar, second_bar = (None, None) if state_bar is None else state_bar[1:]
        return [
            zero_filled(at.structure, bar, values)
            for bar, values in zip(
                (params_bar, first_bar, second_bar), (at.params, *at.moments), strict=True
            )
        ]

    def _pull_back(self, at: UpdatePoint, bars: list[Leaves], *, all_inputs: bool) -> list[Leaves]:
        """Return the cotangents of gradients and, with ``all_inputs``, parameters and moments."""

        def rule(
            key: LeafKey,
            p: Tensor,
            g: Tensor,
            m: Tensor | None,
            s: Tensor | None,
            p_bar: Tensor,
            m_bar: Tensor | None,
            s_bar: Tensor | None,
        ) -> tuple[Tensor | None, ...]:
            p_wide, g_rule = self._rule_inputs(at, key, p, g)
            p_bar = p_bar.to(p_wide.dtype)
            given = RuleStep(p_bar * -at.lrs[key.group], m_bar, s_bar)
            g_bar, *moment_bars = self._direction_vjp(g_rule, m, s, at.steps, given, all_inputs)
            old_bar = None
            if all_inputs:
                decayed_bar = given.step if self._decoupled else g_bar
                old_bar = add_decay(p_bar, decayed_bar, key.decay).to(p.dtype)
            if at.scale is not None:
                g_bar = g_bar * at.scale.to(g_bar)
            return g_bar.to(g.dtype), old_bar, *moment_bars

        columns = [at.params, at.grads, *at.moments, *bars]
        new = map_buckets(rule, at.params, at.keys, columns, 4)
        if self.differentiate_clip and at.norm is not None and self.max_norm is not None:
            new[0] = add_scale_path(at, new[0], self.max_norm)
        return new

    def _state(self, at: UpdatePoint, count: Tensor, moments: list[Leaves]) -> OptimizerState:
        first, second = (
            at.structure.unflatten(moment) if present else None
            for moment, present in zip(moments, self._moments(), strict=True)
        )
        return OptimizerState(count, first, second)
