"""How far the raw weights of a network travel in a run, by a simulated run of the upper level.

A table moves one number a row, so its travel follows from the optimizer alone. A network moves all
its parameters at once, and each of them moves the weights of all examples: under Adam the raw
weight of example i moves up to ‖∂raw_i/∂φ‖₁ times as far in a step as one parameter does, and
farther still as the layers grow together. So the upper steps of the run are taken with its own
optimizer and schedule, on features of its own examples. Each pushes the raw weights r in the same
direction s, that in which the network separates the examples most: the leading left singular vector
of ∂r/∂φ at the start. ::

    hypergradient = ∂⟨s, r(φ)⟩/∂φ        travel = max_i |r_i(φ at the end) − r_i(φ at the start)|

Weights that are compared within a batch move against its mean, so r is less its mean. This is the
most that a consistent hypergradient can do; one that changes its mind does less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from weighting.base import Batch, Params, Weighting

_SIMULATED_STEPS = 256
_HALVINGS = 10  # of a factor of 2: to one part in 1,400, far below what is kept of the rate
_DOUBLINGS = 12  # of the rate of a table, up and down: beyond them, features do not differ


@dataclass(frozen=True)
class NetTravel:
    """What determines how far the raw weights of a network travel.

    Attributes:
        weighting: The network, whose parameters have no row for an example.
        params: Its parameters before the first upper step.
        batch: What it reads of some of the run's training examples.
        optimizer: A function from the learning rate of every upper step, as a function of their
            number, to the optimizer of the upper level.
        shares: The learning rate of each upper step, as a share of the peak.
    """

    weighting: Weighting
    params: Params
    batch: Batch
    optimizer: Callable[[Callable[[Any], float]], Any]
    shares: Callable[[int], float]

    def distance(self, steps: int, peak: float, *, by_noise: bool = False) -> float:
        """Return how far the raw weight of an example travels, at most, in so many upper steps.

        More than 256 of them are taken as 256, each at the sum of the rates of those in its place.

        Args:
            steps: The number of upper steps of the run.
            peak: The peak learning rate.
            by_noise: Whether each step pushes in a random direction of its own (normal, the same
                for every call) in place of s.
        """
        return self._travelled(self._shares_of(steps), peak, by_noise=by_noise)

    def in_a_step(self, peak: float) -> float:
        """Return how far the raw weight of an example travels, at most, in one step at the peak."""
        return self._travelled([1.0], peak)

    def _shares_of(self, steps: int) -> list[float]:
        """Return the sum of the shares of the steps that a simulated one stands for, for each."""
        simulated = min(steps, _SIMULATED_STEPS)
        edges = [round(steps * step / simulated) for step in range(simulated + 1)]
        return [sum(map(self.shares, range(low, high))) for low, high in pairwise(edges)]

    def _travelled(self, shares: Sequence[float], peak: float, *, by_noise: bool = False) -> float:
        """Return the distance of simulated steps with these shares of the peak rate."""
        rates = [peak * share for share in shares]
        optimizer = self.optimizer(lambda count: rates[min(int(count), len(rates) - 1)])
        params: Params = {name: leaf.detach().double() for name, leaf in self.params.items()}
        start, direction, state = self._raw(params), self._direction, optimizer.init(params)
        generator = torch.Generator().manual_seed(0)
        for _ in rates:
            if by_noise:
                direction = torch.randn(len(start), generator=generator, dtype=torch.float64)
            found = self._pulled_back(params, direction)
            with torch.no_grad():
                params, state = optimizer.update(found, state, params)
        return float((self._raw(params) - start).abs().max())

    def _raw(self, params: Params) -> Tensor:
        """Return raw weights, [examples]; less their mean where weights are compared."""
        _, raw = self.weighting.file_weights(params, [self._wide_batch])
        compares = any(getattr(self.weighting, name, False) for name in ("centre", "normalise"))
        return raw - raw.mean() if compares else raw

    def _pulled_back(self, params: Params, direction: Tensor) -> dict[str, Tensor]:
        """Return ∂⟨direction, r(φ)⟩/∂φ."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        with torch.enable_grad():
            pushed = (direction * self._raw(leaves)).sum()
            found = torch.autograd.grad(pushed, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    @cached_property
    def _wide_batch(self) -> Batch:
        return {
            name: value.double() if value.is_floating_point() else value
            for name, value in self.batch.items()
        }

    @cached_property
    def _direction(self) -> Tensor:
        """The leading left singular vector of ∂r/∂φ at the start, [examples]."""
        params = {name: leaf.detach().double() for name, leaf in self.params.items()}
        count = len(self._raw(params))
        rows = [self._pulled_back(params, one) for one in torch.eye(count, dtype=torch.float64)]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows])
        left: Tensor = torch.linalg.svd(jacobian, full_matrices=False).U
        return left[:, 0]

    def peak_for(self, steps: int, target: float) -> float:
        """Return the peak learning rate at which ``distance`` is ``target``, to two digits.

        Found by halving, since the distance is not proportional to it. Two digits, so that a
        resumed run, or one with other threads, finds the same. 0 if no rate moves the weights.
        """
        shares = self._shares_of(steps)
        low = high = target / max(sum(shares), 1e-12)
        doublings = 0
        while self._travelled(shares, low) > target and doublings < _DOUBLINGS:
            low, doublings = low / 2.0, doublings + 1
        while self._travelled(shares, high) < target:
            high, doublings = high * 2.0, doublings + 1
            if doublings > _DOUBLINGS:
                return 0.0
        for _ in range(_HALVINGS + doublings):
            middle = math.sqrt(low * high)
            low, high = (
                (middle, high) if self._travelled(shares, middle) < target else (low, middle)
            )
        return float(f"{math.sqrt(low * high):.2g}")
