"""Adam's relatives NAdam, RAdam and Adamax, and AdaDelta: see ``optimizers``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.checks import check_betas, require
from bilevel.optimizers.base import OptimizerState
from bilevel.optimizers.elementwise import ElementwiseOptimizer
from bilevel.optimizers.hyperparameters import LearnableOptimizer
from bilevel.optimizers.optimizers import SMALL_EPS, Adam, check_eps_of_moments
from bilevel.optimizers.rules import Adaptive, RuleStep
from bilevel.tree import Tree


@dataclass(frozen=True)
class NAdam(Adam):
    """Adam with Nesterov momentum (Dozat 2016), computed as in ``torch.optim.NAdam``.

    With ``μ_t = β₁ (1 − ½ 0.96^(t ψ))`` and ``Π_t = μ_1 ⋯ μ_t``, and m', s' as in ``Adam``::

        u = (μ_{t+1} m'/(1 − Π_{t+1}) + (1 − μ_t) g₂/(1 − Π_t)) / (√(s'/(1 − β₂ᵗ)) + eps)

    Args:
        momentum_decay: ψ.

    Raises:
        ValueError: ``Adam`` raises it for the same values; β₁ = 0, which leaves ``Adam``'s rule
            without momentum; momentum_decay < 0.
    """

    momentum_decay: float = 0.004

    _learnable: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "betas[0]", self.betas[0], low_open=True, high=1.0)
        require(self, "momentum_decay", self.momentum_decay)

    def _direction(self, g: Tensor, m: Tensor | None, s: Tensor | None, steps: int) -> RuleStep:
        assert m is not None
        assert s is not None
        rule = self._coefficients(steps)
        first = torch.lerp(m, g, 1.0 - rule.beta1)
        second = (s * rule.beta2).addcmul(g, g, value=rule.gain)
        numerator = (first + rule.lookahead * g) / rule.correction1
        return RuleStep(numerator / ((second / rule.correction2).sqrt() + self.eps), first, second)

    def _coefficients(self, steps: int) -> Adaptive:
        beta1, beta2 = self.betas
        # Of the powers of β₁ that Adam's correction has, each is μ here. Their product is not kept
        # in the state, since it follows from the number of steps.
        number = torch.arange(1, steps + 2, dtype=torch.float64, device="cpu")
        mu = beta1 * (1.0 - 0.5 * 0.96 ** (number * self.momentum_decay))
        product = float(mu[:-1].prod())
        now, coming = float(mu[-2]), float(mu[-1])
        correction1 = (1.0 - product * coming) / coming
        return Adaptive(
            self.eps,
            beta1,
            beta2,
            gain=1.0 - beta2,
            correction1=correction1,
            correction2=1.0 - beta2**steps,
            lookahead=(1.0 - now) / (1.0 - product) * correction1,
        )


@dataclass(frozen=True)
class RAdam(Adam):
    """Rectified Adam (Liu et al. 2020), computed as in ``torch.optim.RAdam``.

    With m', s' as in ``Adam``, ``ρ_∞ = 2/(1 − β₂) − 1`` and ``ρ = ρ_∞ − 2 t β₂ᵗ/(1 − β₂ᵗ)``::

        u = m'/(1 − β₁ᵗ)                                       while ρ ≤ 5
        u = r m'/(1 − β₁ᵗ) · √(1 − β₂ᵗ)/(√s' + eps)            afterwards
        r² = (ρ − 4)(ρ − 2) ρ_∞ / ((ρ_∞ − 4)(ρ_∞ − 2) ρ)

    A step of the first kind depends on the size of its gradient, so that the hypergradient through
    it is not near 0, as it is through a cold step of ``Adam``.

    Raises:
        ValueError: ``Adam`` raises it for the same values.
    """

    _learnable: ClassVar[tuple[str, ...]] = ()

    is_blind_when_cold = False

    def init(self, params: Tree) -> OptimizerState:
        """Return the state before the first step.

        Raises:
            ValueError: ``eps`` underflows in the precision of the moments.
        """
        check_eps_of_moments(self, self.eps, self.eps, params)
        return ElementwiseOptimizer.init(self, params)

    def _direction(self, g: Tensor, m: Tensor | None, s: Tensor | None, steps: int) -> RuleStep:
        assert m is not None
        assert s is not None
        beta1, beta2 = self.betas
        first = torch.lerp(m, g, 1.0 - beta1)
        second = (s * beta2).addcmul(g, g, value=1.0 - beta2)
        step = first / (1.0 - beta1**steps)
        scale = self._scale(steps)
        return RuleStep(
            step if scale is None else step * scale / (second.sqrt() + self.eps), first, second
        )

    def _direction_vjp(
        self,
        g: Tensor,
        m: Tensor | None,
        s: Tensor | None,
        steps: int,
        bars: RuleStep,
        all_inputs: bool,
    ) -> RuleStep:
        if self._scale(steps) is not None:
            return super()._direction_vjp(g, m, s, steps, bars, all_inputs)
        beta1, beta2 = self.betas
        first_bar = bars.step / (1.0 - beta1**steps)
        if bars.first_moment is not None:
            first_bar = first_bar + bars.first_moment
        grads_bar, second_bar = (1.0 - beta1) * first_bar, bars.second_moment
        if second_bar is not None:
            grads_bar = grads_bar.addcmul(g, second_bar, value=2.0 * (1.0 - beta2))
            second_bar = second_bar * beta2
        return RuleStep(grads_bar, beta1 * first_bar, second_bar)

    def _predicted_gain(self, m: Tensor | None, s: Tensor | None, count: int) -> float | Tensor:
        if self._scale(count + 1) is None:
            return (1.0 - self.betas[0]) / (1.0 - self.betas[0] ** (count + 1))
        return super()._predicted_gain(m, s, count)

    def _scale(self, steps: int) -> float | None:
        """Return r √(1 − β₂ᵗ), None while the variance of the step is unbounded."""
        power = self.betas[1] ** steps
        end = 2.0 / (1.0 - self.betas[1]) - 1.0
        rho = end - 2.0 * steps * power / (1.0 - power)
        if rho <= 5.0:
            return None
        rectified = (rho - 4.0) * (rho - 2.0) * end / ((end - 4.0) * (end - 2.0) * rho)
        return math.sqrt(rectified * (1.0 - power))

    def _coefficients(self, steps: int) -> Adaptive:
        plain, scale = super()._coefficients(steps), self._scale(steps)
        root = math.sqrt(plain.correction2)
        return plain._replace(
            # The rule has eps beside √s', and not beside √(s'/c₂).
            eps=self.eps / root,
            correction1=plain.correction1 * (1.0 if scale is None else root / scale),
        )


@dataclass(frozen=True)
class Adamax(LearnableOptimizer):
    """Adam with an infinity norm (Kingma & Ba 2014), computed as in ``torch.optim.Adamax``.

    ``m' = β₁ m + (1 − β₁) g₂``, ``s' = max(β₂ s, |g₂| + eps)``, ``u = m'/((1 − β₁ᵗ) s')``.

    At a tie of the maximum the derivative is that of its second argument, and that of |g| at 0 is
    taken to be 0.

    Raises:
        ValueError: ``Adam`` raises it for the same values.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self, self.betas, self.eps)

    @property
    def is_blind_when_cold(self) -> bool:
        """Whether the first step hardly depends on the size of the gradient."""
        return self.eps < SMALL_EPS

    def init(self, params: Tree) -> OptimizerState:
        """Return the state before the first step.

        Raises:
            ValueError: ``eps`` underflows in the precision of the moments.
        """
        check_eps_of_moments(self, self.eps, self.eps, params)
        return super().init(params)

    def _moments(self) -> tuple[bool, bool]:
        return True, True

    def _direction(self, g: Tensor, m: Tensor | None, s: Tensor | None, steps: int) -> RuleStep:
        first, second = self._new_moments(g, m, s)
        return RuleStep(first / ((1.0 - self.betas[0] ** steps) * second), first, second)

    def _direction_vjp(
        self,
        g: Tensor,
        m: Tensor | None,
        s: Tensor | None,
        steps: int,
        bars: RuleStep,
        all_inputs: bool,
    ) -> RuleStep:
        """Return m̄ = m̄' + ū/(c₁ s') and s̄ = s̄' − ū u/s', carried on to g, m and s."""
        assert s is not None
        beta1, beta2 = self.betas
        first, second = self._new_moments(g, m, s)
        from_gradient = g.abs() + self.eps >= beta2 * s
        first_bar = bars.step / ((1.0 - beta1**steps) * second)
        second_bar = -first_bar * first / second
        if bars.first_moment is not None:
            first_bar = first_bar + bars.first_moment
        if bars.second_moment is not None:
            second_bar = second_bar + bars.second_moment
        grads_bar = (1.0 - beta1) * first_bar + torch.where(
            from_gradient, g.sign() * second_bar, 0.0
        )
        kept = torch.where(from_gradient, 0.0, beta2 * second_bar)
        return RuleStep(grads_bar, beta1 * first_bar, kept)

    def _new_moments(self, g: Tensor, m: Tensor | None, s: Tensor | None) -> tuple[Tensor, Tensor]:
        assert m is not None
        assert s is not None
        first = torch.lerp(m, g, 1.0 - self.betas[0])
        return first, torch.maximum(s * self.betas[1], g.abs() + self.eps)

    def _predicted_gain(self, m: Tensor | None, s: Tensor | None, count: int) -> Tensor:
        assert s is not None
        factor = (1.0 - self.betas[0]) / (1.0 - self.betas[0] ** (count + 1))
        known = s > self.eps  # It is eps where every gradient was 0, and 0 before the first step.
        return torch.where(known, factor / s, 1.0)


@dataclass(frozen=True)
class AdaDelta(LearnableOptimizer):
    """AdaDelta (Zeiler 2012), computed as in ``torch.optim.Adadelta``.

    ``s' = rho s + (1 − rho) g₂²``, ``u = √(m + eps)/√(s' + eps) · g₂``,
    ``m' = rho m + (1 − rho) u²``. The first moment m is the mean of squared steps, and eps lies
    under the roots, so that the derivative exists everywhere. Its authors have lr = 1.

    Raises:
        ValueError: ``lr`` < 0, rho is outside [0, 1), eps ≤ 0, weight_decay < 0 or max_norm ≤ 0.
    """

    rho: float = 0.9
    eps: float = 1e-6

    _predicts_from_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "rho", self.rho, high=1.0)
        require(self, "eps", self.eps, low_open=True)

    @property
    def is_blind_when_cold(self) -> bool:
        """Whether the first step hardly depends on the size of the gradient."""
        return self.eps < SMALL_EPS

    def init(self, params: Tree) -> OptimizerState:
        """Return the state before the first step.

        Raises:
            ValueError: ``eps`` underflows in the precision of the moments.
        """
        check_eps_of_moments(self, self.eps, self.eps, params)
        return super().init(params)

    def _moments(self) -> tuple[bool, bool]:
        return True, True

    def _direction(self, g: Tensor, m: Tensor | None, s: Tensor | None, steps: int) -> RuleStep:
        assert m is not None
        second, ratio = self._ratio(g, m, s)
        step = ratio * g
        return RuleStep(step, (m * self.rho).addcmul(step, step, value=1.0 - self.rho), second)

    def _direction_vjp(
        self,
        g: Tensor,
        m: Tensor | None,
        s: Tensor | None,
        steps: int,
        bars: RuleStep,
        all_inputs: bool,
    ) -> RuleStep:
        """Return ḡ = r ū + 2 (1 − ρ) g s̄, with ū and s̄ those through m' and u = r g, too."""
        assert m is not None
        second, ratio = self._ratio(g, m, s)
        step_bar, first_bar = bars.step, None
        if bars.first_moment is not None:
            step_bar = step_bar + 2.0 * (1.0 - self.rho) * ratio * g * bars.first_moment
            first_bar = self.rho * bars.first_moment
        through = 0.5 * step_bar * ratio * g
        second_bar = -through / (second + self.eps)
        if bars.second_moment is not None:
            second_bar = second_bar + bars.second_moment
        grads_bar = ratio * step_bar + 2.0 * (1.0 - self.rho) * g * second_bar
        through = through / (m + self.eps)
        first_bar = through if first_bar is None else first_bar + through
        return RuleStep(grads_bar, first_bar, self.rho * second_bar)

    def _ratio(self, g: Tensor, m: Tensor | None, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return s' and r = √(m + eps)/√(s' + eps)."""
        assert m is not None
        assert s is not None
        second = (s * self.rho).addcmul(g, g, value=1.0 - self.rho)
        return second, ((m + self.eps).sqrt() / (second + self.eps).sqrt())

    def _predicted_gain(self, m: Tensor | None, s: Tensor | None, count: int) -> Tensor:
        assert m is not None
        assert s is not None
        return ((m + self.eps) / (s + self.eps)).sqrt()
