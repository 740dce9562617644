"""An operation of the sweep in losses, with references for its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bilevel import SGD, BilevelProblem, OneStep, ReweightingProblem, Unrolled
from bilevel.lower.hessian_product import hessian_product
from bilevel.lower.lower_pass import lower_pass
from tests.bilevel.operations import EXAMPLES, SIZE, Operation, draw
from tests.bilevel.run_window import run_step, run_window

F64 = torch.float64
LR = 0.1


class Case:
    """The operation after a linear layer, in a loss per example and in a scalar loss."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.lower = {"w": draw(SIZE, 5) / 2, **operation.params}
        self.upper = {"r": draw(EXAMPLES), "s": draw(2)}
        self.batch = draw(EXAMPLES, 5)
        self.targets = {name: draw(*leaf.shape) for name, leaf in self.lower.items()}
        self.per_example: ReweightingProblem[Any, Any, Any] = ReweightingProblem(
            lambda lower, batch: (self.losses(lower, batch), None),
            lambda upper, batch, features: self.weights(upper),
            self.upper_loss,
        )
        self.scalar: BilevelProblem[Any, Any, Any] = BilevelProblem(self.loss, self.upper_loss)

    def losses(self, lower: Mapping[str, Tensor], batch: Tensor, apply: Any = None) -> Tensor:
        apply = self.operation.apply if apply is None else apply
        out = apply(functional.linear(batch, lower["w"]), lower).flatten(1)
        steps = torch.arange(1.0, 1 + out.shape[1], dtype=F64)
        return (out * steps.sin() + 0.3 * out.square()).mean(1)

    @staticmethod
    def weights(upper: Mapping[str, Tensor]) -> Tensor:
        return torch.sigmoid(upper["r"]) * upper["s"].exp().sum()

    def loss(self, lower: Any, upper: Any, batch: Tensor, apply: Any = None) -> Tensor:
        return (self.weights(upper) * self.losses(lower, batch, apply)).mean()

    def upper_loss(self, lower: Any, upper: Any, batch: Any) -> Tensor:
        return sum((lower[name].sin() * leaf).sum() for name, leaf in self.targets.items())

    # The reference: first and second derivatives by autograd, the update written out.

    def through_one_step(self, lr: float = LR) -> dict[str, Tensor]:
        """Needs first derivatives alone: ∂w_i/∂φ ⟨−lr v, ∇ℓ_i⟩, one backward per example.

        With ``lr`` = 0 v is that at θ itself, as in order upper-first.
        """
        lower, upper = leaves(self.lower), leaves(self.upper)
        losses = seeded(self.losses, lower, self.batch)
        each = [gradient(one, lower) for one in losses]
        weights = self.weights(upper)
        moved = {
            name: leaf.detach()
            - lr * sum(w * g[name] for w, g in zip(weights.detach(), each, strict=True)) / EXAMPLES
            for name, leaf in lower.items()
        }
        v = gradient(self.upper_loss(leaves_ := leaves(moved), None, None), leaves_)
        slopes = torch.stack([sum((v[name] * g[name]).sum() for name in v) for g in each])
        return gradient((weights * (-LR / EXAMPLES) * slopes.detach()).sum(), upper)

    def through_two_steps(self) -> dict[str, Tensor]:
        upper = leaves(self.upper)
        lower = leaves(self.lower)
        state = torch.Generator().manual_seed(0).get_state()
        for _ in range(2):
            torch.set_rng_state(state)
            slopes = gradient(
                self.loss(lower, upper, self.batch, self.operation.reference),
                lower,
                create_graph=True,
            )
            state = torch.get_rng_state()
            lower = {name: leaf - LR * slopes[name] for name, leaf in lower.items()}
        return gradient(self.upper_loss(lower, upper, None), upper)

    def hessian_along(self, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        lower = leaves(self.lower)
        slopes = gradient(
            seeded(self.loss, lower, self.upper, self.batch, self.operation.reference),
            lower,
            create_graph=True,
        )
        along = sum((slopes[name] * direction[name]).sum() for name in lower)
        return gradient(along, lower)

    # The package.

    def one_step(self, method: OneStep, problem: Any = None) -> Any:
        torch.manual_seed(0)
        problem = self.per_example if problem is None else problem
        optimizer = SGD(LR)
        state = optimizer.init(self.lower)
        return run_step(
            method, problem, optimizer, self.lower, self.upper, state, [self.batch], 0
        ).hypergradient

    def two_steps(self, method: Unrolled) -> Any:
        torch.manual_seed(0)
        optimizer = SGD(LR)
        state = optimizer.init(self.lower)
        batches = [[self.batch]] * 2
        return run_window(
            method, self.per_example, optimizer, self.lower, self.upper, state, batches, 0
        ).hypergradient

    def product(self, route: Any, direction: Mapping[str, Tensor]) -> Any:
        torch.manual_seed(0)
        upper = leaves(self.upper)
        passed = lower_pass(
            self.per_example, route, self.lower, upper, [self.batch], differentiate=True
        )
        return hessian_product(self.per_example, route, passed, self.lower, upper)(direction)


def leaves(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}


def gradient(
    loss: Tensor, params: Mapping[str, Tensor], create_graph: bool = False
) -> dict[str, Tensor]:
    grads = torch.autograd.grad(
        loss, list(params.values()), create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros_like(leaf) if grad is None else grad.to_dense()
        for (name, leaf), grad in zip(params.items(), grads, strict=True)
    }


def seeded(function: Callable[..., Tensor], *args: Any) -> Tensor:
    torch.manual_seed(0)
    return function(*args)
