"""Points of a trajectory from its gradients; what a window remembers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from bilevel import SGD, Adam, AdamW, ReweightingProblem, Unrolled, WarmupCosine, tree
from bilevel.hypergradients.replay_memory import Point, advance, backwards, keep, way_points
from tests.bilevel.comparing import same_bits
from tests.bilevel.run_window import run_window
from tests.oracles import random_like
from tests.peak_bytes import peak_bytes


@dataclass
class Counted:
    """An optimizer that counts its updates."""

    optimizer: Adam
    updates: int = 0

    def update(self, grads, state, params):
        self.updates += 1
        return self.optimizer.update(grads, state, params)


ADAMW = AdamW(WarmupCosine(0.05, 2, 20), weight_decay=0.1, max_norm=1.0)


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 16, 21, 64])
@pytest.mark.parametrize("optimizer", [ADAMW, SGD(0.1, max_norm=1.0)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("given", [way_points, lambda point, steps: [0]], ids=["way", "start"])
def test_points_come_back_bit_for_bit_in_reverse(given, optimizer, steps, store):
    params = {"w": torch.randn(4, 3), "b": torch.randn(3), "idle": torch.randn(2)}
    point = Point(params, optimizer.init(params))
    grads, points = [], []
    for seed in range(steps):
        found = {**random_like(params, seed), "idle": None}
        grads.append(found)
        points.append(point)
        point = advance(optimizer, point, found)
    kept, counted = [keep(found, store) for found in grads], Counted(optimizer)
    known = [(index, keep(points[index], store)) for index in given(points[0], steps)]
    for index, (found, before) in enumerate(backwards(counted, known, kept, store)):
        assert same_bits(found, grads[steps - 1 - index])
        assert same_bits(before, points[steps - 1 - index])
        assert len(kept) == steps - 1 - index
    assert index == steps - 1
    bisections = steps / 2 * math.ceil(math.log2(steps))
    most = bisections + (0 if optimizer is ADAMW else 3 * steps)
    if given is way_points and optimizer is ADAMW:
        most -= steps - 1
    assert counted.updates <= most


def test_way_points_are_the_start_and_the_middles_of_what_remains():
    params = {"w": torch.randn(4, 3)}
    point = Point(params, ADAMW.init(params))
    found = {steps: way_points(point, steps) for steps in (1, 2, 7, 16)}
    assert found == {1: [0], 2: [0, 1], 7: [0, 3, 5, 6], 16: [0, 8, 12, 14, 15]}
    assert way_points(Point(params, SGD(0.1).init(params)), 16) == [0]


WIDTH = 200


def wide_problem():
    """Many parameters, few activations: what is remembered of the steps is all that counts."""

    def losses(lower, batch):
        hidden = torch.tanh(batch @ lower["first"])
        return (torch.tanh(hidden @ lower["second"]) @ lower["head"]).square().squeeze(1), None

    problem = ReweightingProblem(
        losses,
        lambda upper, batch, features: upper,
        lambda lower, upper, batch: losses(lower, batch)[0].mean(),
    )
    params = {
        "first": torch.randn(WIDTH, WIDTH) / WIDTH**0.5,
        "second": torch.randn(WIDTH, WIDTH) / WIDTH**0.5,
        "head": torch.randn(WIDTH, 1) / WIDTH**0.5,
    }
    return problem, params


@pytest.mark.parametrize(
    "optimizer", [SGD(0.1), SGD(0.1, 0.9), Adam(1e-3)], ids=["sgd", "momentum", "adam"]
)
def test_memory_per_step(optimizer):
    """One gradient and a little, whatever the optimizer; a constant if only few are kept.

    Without moments it is one gradient and nothing else, from the first steps on."""
    problem, params = wide_problem()
    x = torch.randn(3, WIDTH)
    state = optimizer.init(params)
    size = 4 * sum(leaf.numel() for leaf in tree.leaves(params))
    point = 4 * sum(
        leaf.numel() for leaf in tree.leaves((params, state)) if leaf.is_floating_point()
    )

    def peak(method, steps):
        batches = [[x]] * steps
        upper = torch.ones(3)
        return peak_bytes(
            lambda: run_window(method, problem, optimizer, params, upper, state, batches, x)
        )

    peak(Unrolled(), 4)  # what the first call allocates for good
    growth = {
        replay: (peak(Unrolled(replay=replay), 32) - peak(Unrolled(replay=replay), 8)) / 24
        for replay in (None, 4, "sqrt")
    }
    assert growth[None] <= 1.25 * point
    assert growth[None] <= size + 2 * point / 24 + 0.05 * size
    if point == size:
        for fewer, more in ((4, 8), (8, 16)):
            assert peak(Unrolled(), more) - peak(Unrolled(), fewer) <= 1.05 * size * (more - fewer)
    assert growth[4] <= point / 4 + 0.05 * size
    assert growth["sqrt"] <= 1.25 * point
