"""Update directions (TorchOpt's) and their derivatives in closed form, for one tensor.

The only module that imports torchopt. That library is unmaintained and has known defects, kept
out here (each is covered by a test against `torch.optim` or finite differences):

- it works in place by default: ``inplace=False`` at every call;
- `trace` counts its own calls in a closure, so a transformation built after a resume would
  forget the momentum: its first call is spent on a dummy;
- Adam's bias correction is a float32 power of the count: a float64 count makes it exact;
- differentiating through Adam, RMSProp or Adagrad gives NaN where a gradient is exactly 0:
  `adaptive_vjp` does not differentiate through it.

Everything is elementwise: tensors are a parameter or several put end to end (`buckets`), and
`steps` is the number of steps taken, this one included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchopt import apply_updates
from torchopt.base import EmptyState
from torchopt.transform import (
    add_decayed_weights,
    scale,
    scale_by_adam,
    scale_by_rms,
    scale_by_rss,
    trace,
)
from torchopt.transform.scale_by_adam import ScaleByAdamState
from torchopt.transform.scale_by_rms import ScaleByRmsState
from torchopt.transform.scale_by_rss import ScaleByRssState
from torchopt.transform.trace import TraceState


class Direction(NamedTuple):
    """What a rule makes of a gradient: the step is ``params − lr · step``. None: no such moment."""

    step: Tensor
    first_moment: Tensor | None = None
    second_moment: Tensor | None = None


class Adaptive(NamedTuple):
    """Coefficients of one step of an adaptive rule, ``u = (m'/c₁) / (√(s'/c₂) + ε)`` with::

        m' = β₁ m + (1 − β₁) g        s' = β₂ s + γ g²

    Adam: γ = 1 − β₂, c₁ = 1 − β₁ᵗ, c₂ = 1 − β₂ᵗ. RMSProp: β₁ = 0, γ = 1 − β₂, c₁ = c₂ = 1.
    Adagrad: β₁ = 0, β₂ = γ = c₁ = c₂ = 1.
    """

    eps: float
    beta1: float = 0.0
    beta2: float = 1.0
    gain: float = 1.0  # γ
    correction1: float = 1.0  # c₁
    correction2: float = 1.0  # c₂


def add_decay(grads: Tensor, params: Tensor, weight_decay: float) -> Tensor:
    """Return ``grads + weight_decay · params``."""
    if weight_decay == 0.0:
        return grads
    decay = add_decayed_weights(weight_decay)
    return decay.update(grads, EmptyState(), params=params, inplace=False)[0]


def descend(params: Tensor, step: Tensor, lr: float | Tensor) -> Tensor:
    """Return ``params − lr · step``."""
    updates, _ = scale(-lr).update(step, EmptyState(), inplace=False)
    return apply_updates(params, updates, inplace=False)


def momentum_direction(grads: Tensor, first: Tensor, momentum: float, nesterov: bool) -> Direction:
    """Return ``m' = μ m + g`` and the step m', or g + μ m' for Nesterov's.

    Source: Sutskever et al. 2013, in the form of `torch.optim.SGD` without dampening.
    """
    rule = trace(momentum, nesterov=nesterov)
    dummy = first.new_zeros(1)
    rule.update(dummy, TraceState(dummy), inplace=False)  # spends the closure's "first call"
    step, state = rule.update(grads, TraceState(first), inplace=False)
    return Direction(step, first_moment=state.trace)


def adam_direction(
    grads: Tensor,
    first: Tensor,
    second: Tensor,
    steps: int | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Adam's step and new moments (Kingma & Ba 2014); `steps` may be one per row."""
    # On the CPU unless given per row: a scalar there mixes with any device, without a transfer.
    taken = steps if isinstance(steps, Tensor) else torch.tensor(steps, device="cpu")
    count = taken.to(torch.float64) - 1.0
    rule = scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)
    step, state = rule.update(grads, ScaleByAdamState(first, second, count), inplace=False)
    return step.to(first.dtype), state.mu, state.nu


def rms_direction(grads: Tensor, second: Tensor, beta: float, eps: float) -> Direction:
    """Return RMSProp's step and second moment (Tieleman & Hinton 2012), not centred."""
    rule = scale_by_rms(alpha=beta, eps=eps)
    step, state = rule.update(grads, ScaleByRmsState(second), inplace=False)
    return Direction(step, second_moment=state.nu)


def adagrad_direction(grads: Tensor, second: Tensor, eps: float) -> Direction:
    """Return Adagrad's step and sum of squares (Duchi et al. 2011)."""
    rule = scale_by_rss(eps=eps)
    step, state = rule.update(grads, ScaleByRssState(second), inplace=False)
    return Direction(step, second_moment=state.sum_of_squares)


def momentum_vjp(
    step_bar: Tensor, first_bar: Tensor | None, momentum: float, nesterov: bool
) -> Direction:
    """Return the cotangents of `momentum_direction`'s gradient (as `step`) and buffer."""
    buffer_bar = momentum * step_bar if nesterov else step_bar
    if first_bar is not None:
        buffer_bar = buffer_bar + first_bar
    grads_bar = buffer_bar + step_bar if nesterov else buffer_bar
    return Direction(grads_bar, first_moment=momentum * buffer_bar)


def adaptive_grads_vjp(
    grads: Tensor, first: Tensor | None, second: Tensor, step_bar: Tensor, rule: Adaptive
) -> Tensor:
    """Return (∂u/∂g)ᵀ ū, the cotangent of the gradient through direction and moments::

        (∂u/∂g)ᵀ ū = ū/D · ( (1 − β₁)/c₁ − u · γ g / √(c₂ s') ),     D = √(s'/c₂) + ε

    g/√s' is bounded by 1/√γ and is taken as 0 where s' = 0 (then g = 0 too, where |g| has the
    symmetric derivative 0): finite everywhere, and (1 − β₁)/(c₁ ε) at g = 0 from a cold state.
    """
    return _adaptive(grads, first, second, step_bar, rule)[0]


def adaptive_vjp(
    grads: Tensor,
    first: Tensor | None,
    second: Tensor,
    step_bar: Tensor,
    first_bar: Tensor | None,
    second_bar: Tensor | None,
    rule: Adaptive,
) -> Direction:
    """Return the cotangents of gradient (as `step`) and moments, for cotangents ū, m̄', s̄'.

    ``∂u/∂s' = −u / (2 D √(c₂ s'))`` does not exist at s' = 0 and is taken as 0 there; as then
    g = 0 and, in any state reached from a cold one, m' = 0, chained steps stay exact.
    """
    grads_bar, ratio, product, inverse_root = _adaptive(grads, first, second, step_bar, rule)
    first_total = ratio / rule.correction1
    second_total = -0.5 * product * inverse_root
    if first_bar is not None:
        grads_bar = grads_bar + (1.0 - rule.beta1) * first_bar
        first_total = first_total + first_bar
    if second_bar is not None:
        grads_bar = grads_bar + (2.0 * rule.gain) * grads * second_bar
        second_total = second_total + second_bar
    return Direction(grads_bar, rule.beta1 * first_total, rule.beta2 * second_total)


def _adaptive(
    grads: Tensor, first: Tensor | None, second: Tensor, step_bar: Tensor, rule: Adaptive
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (∂u/∂g)ᵀ ū, ū/D, u ū/D and 1/√(c₂ s') (0 where s' = 0)."""
    new_first = grads if first is None else first * rule.beta1 + grads * (1.0 - rule.beta1)
    new_second = (second * rule.beta2).addcmul_(grads, grads, value=rule.gain)
    root = (new_second / rule.correction2).sqrt_()
    inverse_root = (root * rule.correction2).reciprocal_()
    inverse_root.masked_fill_(new_second == 0.0, 0.0)
    denominator = root.add_(rule.eps)
    ratio = step_bar / denominator
    product = (new_first / denominator).div_(rule.correction1).mul_(ratio)
    curvature = (grads * inverse_root).mul_(product)
    grads_bar = (ratio * ((1.0 - rule.beta1) / rule.correction1)).sub_(curvature, alpha=rule.gain)
    return grads_bar, ratio, product, inverse_root
