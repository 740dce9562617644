"""TorchOpt's update directions and their derivatives in closed form, for one tensor.

Only this module imports torchopt. That library is unmaintained and has known defects, which are
avoided here. A test against ``torch.optim`` or finite differences covers each:

- It works in place by default, so every call has ``inplace=False``.
- ``trace`` counts its own calls in a closure, so a transformation that is built after a resume
  would lose the momentum. Its first call is therefore made with a dummy.
- Adam's bias correction is a float32 power of the count. A float64 count makes it exact.
- Differentiation through Adam, RMSProp or Adagrad gives NaN where a gradient is exactly 0.
  ``adaptive_vjp`` does not differentiate through them.

Everything is elementwise. A tensor is a parameter or a concatenation of several (``buckets``), and
``steps`` is the number of steps, including the current one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchopt.base import EmptyState
from torchopt.transform import (
    add_decayed_weights,
    scale_by_adam,
    scale_by_rms,
    scale_by_rss,
    trace,
)
from torchopt.transform.scale_by_adam import ScaleByAdamState
from torchopt.transform.scale_by_rms import ScaleByRmsState
from torchopt.transform.scale_by_rss import ScaleByRssState
from torchopt.transform.trace import TraceState


class RuleStep(NamedTuple):
    """The direction of the step ``params − lr · step``, and new moments, None if not used."""

    step: Tensor
    first_moment: Tensor | None = None
    second_moment: Tensor | None = None


class Adaptive(NamedTuple):
    """The coefficients of one step of an adaptive rule.

    ``u = (m' + κ g) / (c₁ (√(s'/c₂) + ε))`` with::

        m' = β₁ m + (1 − β₁) g        s' = β₂ s + γ g²

    Adam has κ = 0, γ = 1 − β₂, c₁ = 1 − β₁ᵗ and c₂ = 1 − β₂ᵗ, RMSProp β₁ = κ = 0, γ = 1 − β₂ and
    c₁ = c₂ = 1, and Adagrad β₁ = κ = 0 and β₂ = γ = c₁ = c₂ = 1.
    """

    eps: float
    beta1: float = 0.0
    beta2: float = 1.0
    gain: float = 1.0  # γ
    correction1: float = 1.0  # c₁
    correction2: float = 1.0  # c₂
    lookahead: float = 0.0  # κ, of Nesterov's rule


def add_decay(grads: Tensor, params: Tensor, weight_decay: float | None) -> Tensor:
    """Return ``grads + weight_decay · params``; None is 0."""
    if not weight_decay:
        return grads
    decay = add_decayed_weights(weight_decay)
    decayed: Tensor = decay.update(grads, EmptyState(), params=params, inplace=False)[0]
    return decayed


def descend(params: Tensor, step: Tensor, lr: float | Tensor) -> Tensor:
    """Return ``params − lr · step``, as TorchOpt's ``scale`` and ``apply_updates`` have it."""
    return params + step * -lr


def momentum_direction(grads: Tensor, first: Tensor, momentum: float, nesterov: bool) -> RuleStep:
    """Return ``m' = μ m + g`` and the step, which is m' or, for Nesterov, g + μ m'.

    Source: Sutskever et al. 2013, in the form of ``torch.optim.SGD`` without dampening.
    """
    rule = trace(momentum, nesterov=nesterov)
    dummy = first.new_zeros(1)
    rule.update(dummy, TraceState(dummy), inplace=False)  # The closure's first call.
    step, state = rule.update(grads, TraceState(first), inplace=False)
    return RuleStep(step, first_moment=state.trace)


def adam_direction(
    grads: Tensor,
    first: Tensor,
    second: Tensor,
    steps: int | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Adam's step and new moments (Kingma & Ba 2014); ``steps`` may be one per row."""
    # A scalar on the CPU combines with tensors on any device without a transfer.
    taken = steps if isinstance(steps, Tensor) else torch.tensor(steps, device="cpu")
    count = taken.to(torch.float64) - 1.0
    rule = scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)
    step, state = rule.update(grads, ScaleByAdamState(first, second, count), inplace=False)
    return step.to(first.dtype), state.mu, state.nu


def rms_direction(grads: Tensor, second: Tensor, beta: float, eps: float) -> RuleStep:
    """Return RMSProp's step and second moment (Tieleman & Hinton 2012), not centred."""
    rule = scale_by_rms(alpha=beta, eps=eps)
    step, state = rule.update(grads, ScaleByRmsState(second), inplace=False)
    return RuleStep(step, second_moment=state.nu)


def adagrad_direction(grads: Tensor, second: Tensor, eps: float) -> RuleStep:
    """Return Adagrad's step and sum of squares (Duchi et al. 2011)."""
    rule = scale_by_rss(eps=eps)
    step, state = rule.update(grads, ScaleByRssState(second), inplace=False)
    return RuleStep(step, second_moment=state.sum_of_squares)


def momentum_vjp(bars: RuleStep, momentum: float, nesterov: bool, *, all_inputs: bool) -> RuleStep:
    """Return the cotangents of the gradient (as ``step``) and, if requested, the old buffer.

    ::

        m̄ = m̄' + ū, or m̄' + μ ū with Nesterov        ḡ = m̄, or m̄ + ū
    """
    buffer_bar = momentum * bars.step if nesterov else bars.step
    if bars.first_moment is not None:
        buffer_bar = buffer_bar + bars.first_moment
    grads_bar = buffer_bar + bars.step if nesterov else buffer_bar
    return RuleStep(grads_bar, momentum * buffer_bar if all_inputs else None)


def adaptive_vjp(
    grads: Tensor,
    first: Tensor | None,
    second: Tensor,
    bars: RuleStep,
    rule: Adaptive,
    *,
    all_inputs: bool,
) -> RuleStep:
    """Return the cotangents of the gradient (as ``step``) and, if requested, the old moments.

    For cotangents ū, m̄', s̄' of direction and new moments, with D = √(s'/c₂) + ε::

        n̄ = ū / (c₁ D)      m̄ = m̄' + n̄      s̄ = s̄' − ū u / (2 D √(c₂ s'))
        ḡ = (1 − β₁) m̄ + κ n̄ + 2 γ g s̄      and β₁ m̄, β₂ s̄ for the old moments

    Where s' = 0, the fraction in s̄ is set to 0. There g = 0, so this does not change ḡ: from a cold
    state it is (1 − β₁) ū / (c₁ ε), the derivative of g/(|g| + ε). In any state that steps can
    reach, m' = 0 there, too, so the derivative of several steps remains exact.
    """
    new_first = grads if first is None else torch.lerp(first, grads, 1.0 - rule.beta1)
    if rule.lookahead:
        new_first = new_first.add(grads, alpha=rule.lookahead)
    root = (second * rule.beta2).addcmul_(grads, grads, value=rule.gain).sqrt_()  # √s'
    # The factors √c₂ of D are collected in ``gain``.
    eps = rule.eps * math.sqrt(rule.correction2)
    gain = math.sqrt(rule.correction2) / rule.correction1
    if not all_inputs:
        # g/√s' is at most 1/√γ. Where s' = 0, it is 0 divided by the smallest possible root.
        least = math.sqrt(torch.finfo(root.dtype).tiny * torch.finfo(root.dtype).eps)
        slope = (grads / root.clamp_(min=least)).mul_(new_first)
        ratio = root.add_(eps).reciprocal_()
        slope.mul_(ratio).mul_(-rule.gain * gain).add_((1.0 - rule.beta1 + rule.lookahead) * gain)
        return RuleStep(ratio.mul_(bars.step).mul_(slope))
    # This is 1/√s', and 0 where s' = 0. Masks would take ten times as long.
    inverse_root = root.reciprocal().nan_to_num_(nan=math.nan, posinf=0.0)
    scaled_denominator = root.add_(eps)
    ratio = bars.step / scaled_denominator
    bend = (new_first * inverse_root).div_(scaled_denominator).mul_(ratio)
    first_bar, second_bar = ratio.mul_(gain), bend.mul_(-0.5 * gain)
    through_lookahead = first_bar * rule.lookahead if rule.lookahead else None
    if bars.first_moment is not None:
        first_bar = first_bar + bars.first_moment
    if bars.second_moment is not None:
        second_bar = second_bar + bars.second_moment
    grads_bar = (first_bar * (1.0 - rule.beta1)).addcmul_(grads, second_bar, value=2.0 * rule.gain)
    if through_lookahead is not None:
        grads_bar = grads_bar.add_(through_lookahead)
    return RuleStep(
        grads_bar, None if first is None else first_bar * rule.beta1, second_bar * rule.beta2
    )


def adaptive_betas_vjp(
    grads: Tensor,
    first: Tensor | None,
    second: Tensor,
    new: RuleStep,
    bars: RuleStep,
    rule: Adaptive,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Return the cotangents of β₁ and β₂ for γ = 1 − β₂ and, unless they are 1, cᵢ = 1 − βᵢᵗ.

    With m̄ and s̄ as in ``adaptive_vjp``, D = √(s'/c₂) + ε and t = ``steps``::

        β̄₁ = Σ m̄ (m − g)  + t β₁ᵗ⁻¹/c₁ Σ ū u
        β̄₂ = Σ s̄ (s − g²) − t β₂ᵗ⁻¹/(2 c₂) Σ ū u √(s'/c₂)/D
    """
    assert new.second_moment is not None
    root = (new.second_moment / rule.correction2).sqrt()
    denominator = root + rule.eps
    moved = bars.step * new.step
    bent = 0.5 * moved / (denominator * root * rule.correction2)
    second_bar = -torch.where(root > 0.0, bent, 0.0)
    if bars.second_moment is not None:
        second_bar = second_bar + bars.second_moment
    beta2_bar = (second_bar * (second - grads * grads)).sum()
    if rule.correction2 != 1.0:
        power = steps * rule.beta2 ** (steps - 1) / (2.0 * rule.correction2)
        beta2_bar = beta2_bar - power * (moved * root / denominator).sum()
    if first is None:
        return torch.zeros_like(beta2_bar), beta2_bar
    first_bar = bars.step / (rule.correction1 * denominator)
    if bars.first_moment is not None:
        first_bar = first_bar + bars.first_moment
    power = steps * rule.beta1 ** (steps - 1) / rule.correction1
    return (first_bar * (first - grads)).sum() + power * moved.sum(), beta2_bar
