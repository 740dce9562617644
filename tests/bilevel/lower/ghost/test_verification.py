"""The parts of the measurement: weights, a step next to θ, the tolerance, and for which shapes."""

from __future__ import annotations

import math

import pytest
import torch

from bilevel import tree
from bilevel.lower.ghost.verification import (
    SHAPES,
    displacement,
    distance,
    known,
    rounding,
    uneven,
)


def test_weights_are_all_different_and_always_the_same():
    weights = uneven(torch.zeros(500, dtype=torch.float64))
    assert len(set(weights.tolist())) == 500
    assert float(weights.min()) >= 0.5
    assert float(weights.max()) < 1.5
    assert torch.equal(weights[:7], uneven(torch.zeros(7, dtype=torch.float64)))


def test_the_step_leaves_the_generators_alone_and_opens_gates():
    params = {"gate": torch.zeros(50), "same": torch.zeros(50), "w": 3.0 * torch.ones(1000)}
    random = torch.get_rng_state()
    steps = displacement(params)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(*pair) for pair in zip(steps, displacement(params), strict=True))
    gate, same, w = (leaf for leaf in steps)
    assert 0.02 < float(gate.std()) < 0.04
    assert not torch.equal(gate, same)
    assert 0.28 < float(w.std()) < 0.32


def test_a_small_leaf_is_held_to_its_own_size():
    eps = rounding([torch.float64], torch.device("cpu"))
    large, small = torch.full((4,), 100.0), torch.full((4,), 0.1)
    assert distance([large, small], [large, small * (1 + 1e-5)], eps) == 0.0
    off = distance([large, small], [large, small * 1.02], eps)
    assert off == pytest.approx(0.002 / 100.0, rel=1e-3)
    noise = torch.full((4,), 1e-5)  # a gradient that is 0 but for rounding
    assert distance([large, noise], [large, -noise], eps) == 0.0
    assert math.isnan(distance([large], [large * math.nan], eps))
    assert distance([small], [0 * small], eps) == math.inf
    assert distance([0 * small], [0 * small], eps) == 0.0


def test_the_tolerance_is_that_of_the_least_precise_numbers():
    cpu = torch.device("cpu")
    exact, rounded = torch.ones(1000), torch.ones(1000).bfloat16() * 1.02
    coarse = rounding([torch.float64, torch.bfloat16], cpu)
    assert coarse == torch.finfo(torch.bfloat16).eps
    assert rounding([torch.float64], cpu) == torch.finfo(torch.float32).eps
    assert rounding([torch.float32], torch.device("cuda")) == 2.0**-10
    assert distance([rounded.float()], [exact], coarse) == 0.0
    assert distance([rounded.float()], [exact], rounding([torch.float32], cpu)) > 0.01


def test_shapes_are_told_apart_and_after_many_only_equal_sizes():
    verdicts = {}
    for length in range(10, 10 + SHAPES):
        key = known(verdicts, 4, [(4, length), (4, length, 7)])
        assert key not in verdicts
        verdicts[key] = None
    first = known(verdicts, 4, [(4, 50), (4, 50, 7)])
    assert first not in verdicts
    verdicts[first] = None
    assert known(verdicts, 4, [(4, 51), (4, 51, 7)]) in verdicts
    assert known(verdicts, 5, [(5, 51), (5, 51, 7)]) in verdicts
    for other in ([(4, 4), (4, 4, 7)], [(4, 7), (4, 7, 7)], [(4, 1), (4, 1, 7)], [(4, 51, 7)]):
        assert known(verdicts, 4, other) not in verdicts
    assert known(verdicts, 4, [(4, 10), (4, 10, 7)]) in verdicts


def test_the_gradients_compared_are_those_of_all_leaves():
    params = {"a": torch.ones(2), "b": torch.zeros(3)}
    assert [leaf.shape for leaf in displacement(params)] == [
        leaf.shape for leaf in tree.leaves(params)
    ]
