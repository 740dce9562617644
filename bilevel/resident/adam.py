"""Adam's and AdamW's step in place by torch's fused kernel, and its derivative along a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.torch_private import (
    foreach_add,
    foreach_add_,
    foreach_clamp_min_,
    foreach_div,
    foreach_div_,
    foreach_mul_,
    foreach_sqrt,
    fused_adamw_,
)
from bilevel.optimizers.elementwise import ElementwiseOptimizer
from bilevel.optimizers.optimizers import Adam, AdamW


@dataclass(frozen=True)
class FusedAdam:
    """The step of ``Adam`` or ``AdamW`` at one number of steps, for leaves of one precision.

    Args:
        decoupled: Whether the decay is AdamW's.
        betas: β₁ and β₂.
        eps: ε.
        steps: The number of the step, from 1.
    """

    decoupled: bool
    betas: tuple[float, float]
    eps: float
    steps: int

    @classmethod
    def of(cls, optimizer: ElementwiseOptimizer, steps: int) -> FusedAdam | None:
        """Return the kernel of an optimizer, None for one with another rule."""
        if type(optimizer) not in (Adam, AdamW) or optimizer.state_dtype is not None:
            return None  # what is derived of Adam has a rule of its own
        assert isinstance(optimizer, Adam)
        return cls(isinstance(optimizer, AdamW), optimizer.betas, optimizer.eps, steps)

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        lr: float,
        decay: float,
        usual: Bool[Tensor, ""] | None = None,
    ) -> list[Tensor]:
        """Take the step in place, and return the gradients that the rule saw.

        Args:
            params: θ.
            grads: Its gradient, weighted and clipped; not changed.
            first: m.
            second: s.
            lr: The learning rate.
            decay: The weight decay λ; 0: none.
            usual: If it is False, nothing moves; None: it is True.
        """
        seen = list(grads)
        if decay and not self.decoupled:
            seen = list(foreach_add(seen, list(params), alpha=decay))
        # Filled where it is: a number that is copied to a device holds up the host.
        count = torch.full((), float(self.steps), device=params[0].device)
        fused_adamw_(
            list(params),
            seen,
            list(first),
            list(second),
            [],
            [count] * len(seen),
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=decay if self.decoupled else 0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            found_inf=None if usual is None else (~usual).to(torch.float32),
        )
        # The kernel does not count as a change of them for autograd; others do.
        torch.autograd.graph.increment_version([*params, *first, *second])
        return seen

    def slope_(
        self,
        raw: Sequence[Tensor],
        seen: Sequence[Tensor] | float,
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        factor: float,
    ) -> None:
        """Multiply ``raw`` by the derivative of the step's direction, in place.

        With the moments m', s' *after* the step, k = √c₂/c₁, e = ε √c₂, x = raw/(√s'+e), and ĝ the
        gradients that the rule saw::

            raw ← factor · k x ((1−β₁) − (1−β₂) m'/√s' ĝ/(√s'+e))

        Where s' = 0, ĝ is 0, and the second term is too.

        Args:
            raw: What the derivative is taken along, like θ.
            seen: ĝ, or what ĝ is of ``raw``, which takes fewer operations.
            first: m'.
            second: s'.
            factor: ``−lr``, and the clip scale.
        """
        (beta1, beta2), steps = self.betas, self.steps
        correction2 = 1.0 - beta2**steps
        gain = factor * math.sqrt(correction2) / (1.0 - beta1**steps)
        # 16 bits would lose the difference of the two terms.
        wide = tree.wide_dtype(raw[0].dtype)
        x, m, s = ([leaf.to(wide) for leaf in column] for column in (raw, first, second))
        least = math.sqrt(torch.finfo(wide).tiny * torch.finfo(wide).eps)
        root = foreach_sqrt(s)
        foreach_clamp_min_(root, least)
        bend = foreach_div(m, root)
        foreach_add_(root, self.eps * math.sqrt(correction2))
        if isinstance(seen, float):
            foreach_div_(x, root)
            turned: Sequence[Tensor] = x
            ratio = seen
        else:
            turned = foreach_div([leaf.to(wide) for leaf in seen], root)
            ratio = 1.0
            foreach_div_(x, root)
        straight = torch.full((), (1.0 - beta1) * gain, dtype=wide, device=raw[0].device)
        for one, other in zip(bend, turned, strict=True):
            torch.addcmul(straight, one, other, value=-(1.0 - beta2) * gain * ratio, out=one)
        foreach_mul_(x, bend)
        if wide != raw[0].dtype:
            for leaf, product in zip(raw, x, strict=True):
                leaf.copy_(product)

    def slope_of_piece_(
        self, flat: Tensor, first: Sequence[Tensor], second: Sequence[Tensor], factor: float
    ) -> None:
        """Multiply a gradient by the derivative of the step's direction, in place.

        In seven operations and two temporaries, in whatever memory the moments are.

        With x = ĝ/(√s'+e), and the other names as in ``slope_``::

            ĝ ← factor · k x ((1−β₁) − (1−β₂) m'/√s' x)

        Args:
            flat: ĝ, the gradient that the rule saw, [entries].
            first: m' of the same leaves, in order.
            second: s'.
            factor: ``−lr``, divided by what the gradient had been multiplied by.
        """
        (beta1, beta2), steps = self.betas, self.steps
        correction2 = 1.0 - beta2**steps
        gain = factor * math.sqrt(correction2) / (1.0 - beta1**steps)
        wide = tree.wide_dtype(flat.dtype)
        root, bend = (
            torch.cat([leaf.reshape(-1) for leaf in column]).to(wide) for column in (second, first)
        )
        # Where s' = 0, ĝ is 0, and so is all of it.
        least = math.sqrt(torch.finfo(wide).tiny * torch.finfo(wide).eps)
        bend.div_(root.sqrt_().clamp_min_(least))
        x = flat.to(wide)
        x.div_(root.add_(self.eps * math.sqrt(correction2)))
        straight = torch.full((), (1.0 - beta1) * gain, dtype=wide, device=flat.device)
        torch.addcmul(straight, bend, x, value=-(1.0 - beta2) * gain, out=bend)
        x.mul_(bend)
        if x is not flat:
            flat.copy_(x)
