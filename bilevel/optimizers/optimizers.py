"""Optimizers as pure functions, each with the exact derivative of its own update.

An optimizer is a frozen dataclass of hyperparameters. ``init`` and ``update`` take a step; ``vjp``
and ``grads_vjp`` pull cotangents back through that step, clipping and weight decay included. They
need no autograd graph, and are finite and correct where a gradient is 0. The equations are in
``elementwise``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_betas, check_eps, require
from bilevel.optimizers import rules
from bilevel.optimizers.base import OptimizerState
from bilevel.optimizers.elementwise import ElementwiseOptimizer
from bilevel.optimizers.groups import GroupValues
from bilevel.optimizers.hyperparameters import LearnableOptimizer
from bilevel.optimizers.point import check_shapes
from bilevel.optimizers.rules import Adaptive, RuleStep, adaptive_betas_vjp
from bilevel.tree import Tree, TreeT

SMALL_EPS = 1e-4  # small beside gradients: a step that is divided by |g| + eps is that of the sign


def check_eps_of_moments(
    optimizer: ElementwiseOptimizer, eps: float, least: float, params: Tree
) -> None:
    """Raise ValueError if ``least``, which ``eps`` goes into, is 0 in the precision of a moment."""
    for dtype in {optimizer.state_dtype or leaf.dtype for leaf in tree.leaves(params)}:
        check_eps(optimizer, eps, least, dtype, "pass state_dtype=torch.float32")


@dataclass(frozen=True)
class SGD(LearnableOptimizer):
    """Gradient descent with heavy-ball or Nesterov momentum, computed as in ``torch.optim.SGD``.

    ``m' = μ m + g₂``; ``u = m'``, or ``u = g₂ + μ m'`` with ``nesterov``, or ``u = g₂`` if μ = 0.

    Raises:
        ValueError: ``lr`` < 0, momentum is outside [0, 1), nesterov has no momentum,
            weight_decay < 0 or max_norm ≤ 0.
    """

    momentum: float = 0.0
    nesterov: bool = False

    _learnable: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "momentum", self.momentum, high=1.0)
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("SGD: nesterov=True needs momentum in (0, 1), got 0.0")

    def update(
        self, grads: Tree, state: OptimizerState, params: TreeT
    ) -> tuple[TreeT, OptimizerState]:
        """Take one step: see ``ElementwiseOptimizer.update``.

        Where it is ``θ − lr g`` and nothing else, leaf by leaf, since two operations on each take
        less time than joining leaves.
        """
        lr = self.plain_rate(state)
        if lr is None or state[1:] != (None, None):
            return super().update(grads, state, params)
        leaves, structure = optree.tree_flatten(params, none_is_leaf=True)
        columns = structure.flatten_up_to(grads)
        check_shapes(params, leaves, columns, "gradient")
        for index, (p, g) in enumerate(zip(leaves, columns, strict=True)):
            if p is not None and g is not None:
                leaves[index] = rules.descend(p, g.to(p.dtype), lr).to(p.dtype)
        return structure.unflatten(leaves), OptimizerState(state.steps + 1, None, None)

    def plain_rate(self, state: OptimizerState) -> float | Tensor | None:
        """Return lr if the step is ``θ − lr g`` and nothing else, or None."""
        if isinstance(self.momentum, Tensor) or isinstance(self.weight_decay, Tensor):
            return None
        more = self.momentum != 0.0 or self.weight_decay != 0.0 or isinstance(self.lr, Mapping)
        if more or (self.group, self.max_norm, self.state_dtype) != (None, None, None):
            return None
        return self._lrs(int(state.steps), ("",))[""]

    def _moments(self) -> tuple[bool, bool]:
        return self.momentum > 0.0, False

    def _direction(self, g: Tensor, m: Tensor | None, s: Tensor | None, steps: int) -> RuleStep:
        if m is None:
            return RuleStep(g)
        return rules.momentum_direction(g, m, self.momentum, self.nesterov)

    def _direction_vjp(
        self,
        g: Tensor,
        m: Tensor | None,
        s: Tensor | None,
        steps: int,
        bars: RuleStep,
        all_inputs: bool,
    ) -> RuleStep:
        if m is None:
            return RuleStep(bars.step)
        return rules.momentum_vjp(bars, self.momentum, self.nesterov, all_inputs=all_inputs)

    def _predicted_gain(self, m: Tensor | None, s: Tensor | None, count: int) -> float:
        return 1.0 + self.momentum if self.nesterov else 1.0

    def _learnable_bars(
        self,
        g: Tensor,
        m: Tensor | None,
        s: Tensor | None,
        steps: int,
        new: RuleStep,
        bars: RuleStep,
    ) -> dict[str, list[Tensor]]:
        """Return ``μ̄ = Σ (m̄' + ū) m``, with Nesterov ``Σ (m̄' + μ ū) m + ū m'``."""
        if m is None:
            raise ValueError(
                "SGD: momentum is 0, where there is no buffer to differentiate; start a learned "
                "momentum above 0"
            )
        assert new.first_moment is not None
        first_bar = bars.step * self.momentum if self.nesterov else bars.step
        if bars.first_moment is not None:
            first_bar = first_bar + bars.first_moment
        found = (first_bar * m).sum()
        if self.nesterov:
            found = found + (bars.step * new.first_moment).sum()
        return {"momentum": [found]}


@dataclass(frozen=True)
class AdaptiveOptimizer(LearnableOptimizer):
    """The base of Adam, RMSProp and Adagrad, whose derivatives differ in coefficients only."""

    def init(self, params: Tree) -> OptimizerState:
        """Return the state before the first step.

        Raises:
            ValueError: ``eps`` underflows in the precision of the moments.
        """
        first = self._coefficients(1)
        # The derivative has eps √c₂ in its denominators.
        least = first.eps * math.sqrt(first.correction2)
        check_eps_of_moments(self, first.eps, least, params)
        return super().init(params)

    @property
    def is_blind_when_cold(self) -> bool:
        """Whether g / (|g| + eps), the first step, hardly depends on the size of g."""
        return self._coefficients(1).eps < SMALL_EPS

    def _coefficients(self, steps: int) -> Adaptive:
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
        assert s is not None
        rule = self._coefficients(steps)
        return rules.adaptive_vjp(g, m, s, bars, rule, all_inputs=all_inputs)

    def _predicted_gain(self, m: Tensor | None, s: Tensor | None, count: int) -> float | Tensor:
        assert s is not None
        now, coming = self._coefficients(max(count, 1)), self._coefficients(count + 1)
        factor = (1.0 - coming.beta1 + coming.lookahead) / coming.correction1
        # This is 1/gain. It is in place, since the pages of new tensors cost more on a CPU than the
        # arithmetic.
        inverse = (s / (now.correction2 * factor * factor)).sqrt_().add_(now.eps / factor)
        cold = float(torch.tensor(now.eps / factor, dtype=inverse.dtype, device="cpu"))
        return torch.threshold_(inverse, cold, 1.0).reciprocal_()


@dataclass(frozen=True)
class Adam(AdaptiveOptimizer):
    """Adam (Kingma & Ba 2014) with L2 weight decay, computed as in ``torch.optim.Adam``.

    ``m' = β₁ m + (1 − β₁) g₂``, ``s' = β₂ s + (1 − β₂) g₂²``,
    ``u = m'/(1 − β₁ᵗ) / (√(s'/(1 − β₂ᵗ)) + eps)`` at step t = 1, 2, …

    Raises:
        ValueError: ``lr`` < 0, a beta is outside [0, 1), eps ≤ 0 (the derivative at g = 0 from a
            cold state is 1/eps), weight_decay < 0 or max_norm ≤ 0.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    _learnable: ClassVar[tuple[str, ...]] = ("betas",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self, self.betas, self.eps)

    def _moments(self) -> tuple[bool, bool]:
        return True, True

    def _direction(self, g: Tensor, m: Tensor | None, s: Tensor | None, steps: int) -> RuleStep:
        assert m is not None
        assert s is not None
        return RuleStep(*rules.adam_direction(g, m, s, steps, self.betas, self.eps))

    def _coefficients(self, steps: int) -> Adaptive:
        beta1, beta2 = self.betas
        return Adaptive(self.eps, beta1, beta2, 1.0 - beta2, 1.0 - beta1**steps, 1.0 - beta2**steps)

    def _learnable_bars(
        self,
        g: Tensor,
        m: Tensor | None,
        s: Tensor | None,
        steps: int,
        new: RuleStep,
        bars: RuleStep,
    ) -> dict[str, list[Tensor]]:
        assert s is not None
        rule = self._coefficients(steps)
        return {"betas": list(adaptive_betas_vjp(g, m, s, new, bars, rule, steps))}


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as in ``torch.optim.AdamW``.

    ``θ' = θ − lr (u + weight_decay θ)``, with u as in ``Adam``.

    Raises:
        ValueError: ``Adam`` raises it for the same values.
    """

    weight_decay: GroupValues = field(default=0.01, kw_only=True)

    _decoupled: ClassVar[bool] = True


@dataclass(frozen=True)
class RMSProp(AdaptiveOptimizer):
    """RMSProp (Tieleman & Hinton 2012), not centred, computed as in ``torch.optim.RMSprop``.

    ``s' = beta s + (1 − beta) g₂²``, ``u = g₂ / (√s' + eps)``. ``beta`` is torch's ``alpha``.

    Raises:
        ValueError: ``lr`` < 0, beta is outside [0, 1), eps ≤ 0, weight_decay < 0 or max_norm ≤ 0.
    """

    beta: float = 0.99
    eps: float = 1e-8

    _learnable: ClassVar[tuple[str, ...]] = ("beta",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "beta", self.beta, high=1.0)
        require(self, "eps", self.eps, low_open=True)

    def _moments(self) -> tuple[bool, bool]:
        return False, True

    def _direction(self, g: Tensor, m: Tensor | None, s: Tensor | None, steps: int) -> RuleStep:
        assert s is not None
        return rules.rms_direction(g, s, self.beta, self.eps)

    def _coefficients(self, steps: int) -> Adaptive:
        return Adaptive(self.eps, beta2=self.beta, gain=1.0 - self.beta)

    def _learnable_bars(
        self,
        g: Tensor,
        m: Tensor | None,
        s: Tensor | None,
        steps: int,
        new: RuleStep,
        bars: RuleStep,
    ) -> dict[str, list[Tensor]]:
        assert s is not None
        rule = self._coefficients(steps)
        return {"beta": [adaptive_betas_vjp(g, None, s, new, bars, rule, steps)[1]]}


@dataclass(frozen=True)
class Adagrad(AdaptiveOptimizer):
    """Adagrad (Duchi et al. 2011), computed as in ``torch.optim.Adagrad``.

    ``s' = s + g₂²``, ``u = g₂ / (√s' + eps)``.

    Raises:
        ValueError: ``lr`` < 0, eps ≤ 0, weight_decay < 0 or max_norm ≤ 0.
    """

    eps: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "eps", self.eps, low_open=True)

    def _moments(self) -> tuple[bool, bool]:
        return False, True

    def _direction(self, g: Tensor, m: Tensor | None, s: Tensor | None, steps: int) -> RuleStep:
        assert s is not None
        return rules.adagrad_direction(g, s, self.eps)

    def _coefficients(self, steps: int) -> Adaptive:
        return Adaptive(self.eps)
