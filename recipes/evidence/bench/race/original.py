"""The original's iteration, re-created from its description.

DreamPRM-1.5 (arXiv 2509.05542) runs Betty's engine with ``darts`` on batches of one: logits and, in
the upper level, a softmax over the vocabulary at every token of the sequence; eager attention; a
gradient clipped to norm 1; AdamW outside of the graph, parameter by parameter; and for φ a central
difference of the lower loss at θ' ± ε v with ε = 0.01/‖v‖, v the gradient of the upper loss at θ'.
Neither the learning rate nor AdamW's derivative is part of that difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from bilevel.optimizers.base import clip_scale
from prm.inputs.collate import Batch
from recipes.evidence.bench.race.model import MINUS_ID, PLUS_ID, Race

RADIUS, MAX_NORM = 0.01, 1.0
_INPUTS = ("input_ids", "pixel_values")


@dataclass(frozen=True)
class Adamw:
    """The numbers of an AdamW."""

    lr: float = 5e-5
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.01


class Original:
    """Iterations on a race's θ, in place.

    Args:
        race: θ and its moments.
        optimizer: The numbers of the lower optimizer.
    """

    def __init__(self, race: Race, optimizer: Adamw | None = None) -> None:
        self._race, self._optimizer = race, optimizer or Adamw()
        self._leaves = {name: leaf.requires_grad_() for name, leaf in _aliases(race.params).items()}
        self._raw = race.weights["deviation"].clone()

    def iteration(self, lower: Batch, upper: Batch) -> Tensor:
        """Take a lower step, and return the hypergradient [instances] after it.

        Args:
            lower: A batch of one example with step labels.
            upper: A batch of one example with an outcome.
        """
        model = self._race.objective.prm.model
        model.set_attn_implementation("eager")
        try:
            with torch.enable_grad():
                self.lower_loss(self._raw, lower).backward()
            self._step()
            with torch.enable_grad():
                loss = self.upper_loss(upper)
            direction = torch.autograd.grad(loss, list(self._leaves.values()))
            del loss
            return self._difference(direction, lower)
        finally:
            model.set_attn_implementation("sdpa")

    def lower_loss(self, raw: Tensor, batch: Batch) -> Tensor:
        """Return w · mean cross-entropy over the vocabulary at the label positions."""
        logits = self._logits(batch)  # [1, tokens, vocabulary]
        at = logits[0, batch["label_positions"][0]]
        target = torch.where(batch["labels"][0] > 0.5, PLUS_ID, MINUS_ID)
        loss = torch.nn.functional.cross_entropy(at, target)
        return (1.0 + raw[batch["index"][0]]).clamp(-1.0, 3.0) * loss

    def upper_loss(self, batch: Batch) -> Tensor:
        """Return (mean p − 1)², p of the label that the outcome calls for, softmax everywhere."""
        probs = self._logits(batch).softmax(-1)
        label = PLUS_ID if batch["correct"][0] > 0.5 else MINUS_ID
        found = probs[0, batch["label_positions"][0], label].mean()
        return (found - 1.0) ** 2

    def _logits(self, batch: Batch) -> Tensor:
        inputs = {name: batch[name] for name in _INPUTS}
        prm = self._race.objective.prm
        device, dtype = prm.device.type, prm.autocast
        # Pass by pass: what autocast has cast it would use again after θ was moved.
        with nullcontext() if dtype is None else torch.autocast(device, dtype=dtype):
            logits: Tensor = functional_call(
                prm.model, self._leaves, kwargs={**inputs, "use_cache": False}
            ).logits
        return logits

    @torch.no_grad()
    def _step(self) -> None:
        """Clip the gradient, and take AdamW's step as transformers' own class did."""
        one, state = self._optimizer, self._race.state
        state.steps.add_(1)
        steps = int(state.steps)
        grads = {name: leaf.grad for name, leaf in self._leaves.items() if leaf.grad is not None}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        scale = clip_scale(norm, MAX_NORM)
        size = one.lr * math.sqrt(1.0 - one.beta2**steps) / (1.0 - one.beta1**steps)
        first, second = _moments(state.first_moment), _moments(state.second_moment)
        for name, grad in grads.items():
            grad.mul_(scale)
            first[name].mul_(one.beta1).add_(grad, alpha=1.0 - one.beta1)
            second[name].mul_(one.beta2).addcmul_(grad, grad, value=1.0 - one.beta2)
            denominator = second[name].sqrt().add_(one.eps)
            param = self._leaves[name]
            param.addcdiv_(first[name], denominator, value=-size)
            param.add_(param, alpha=-one.lr * one.decay)
            param.grad = None

    def _difference(self, direction: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Return ``−(∂φ L(θ + ε v) − ∂φ L(θ − ε v)) / 2 ε``, θ shifted in place and back."""
        length = torch.cat([one.reshape(-1) for one in direction]).norm()
        eps = RADIUS / (float(length) + 1e-15)

        def shifted(by: float) -> Tensor:
            self._shift(direction, by)
            raw = self._raw.detach().requires_grad_()
            with torch.enable_grad():
                loss = self.lower_loss(raw, batch)
            return torch.autograd.grad(loss, raw)[0]

        ahead = shifted(eps)
        behind = shifted(-2.0 * eps)
        self._shift(direction, eps)
        return -(ahead - behind) / (2.0 * eps)

    @torch.no_grad()
    def _shift(self, direction: tuple[Tensor, ...], by: float) -> None:
        for leaf, one in zip(self._leaves.values(), direction, strict=True):
            leaf.add_(one, alpha=by)


def _aliases(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach() for name, leaf in params.items()}


def _moments(moment: object) -> dict[str, Tensor]:
    assert isinstance(moment, dict)
    return moment
