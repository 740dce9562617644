"""Travel of a network's raw weights: closed forms, torch's Adam, the rate for a distance."""

from __future__ import annotations

import math

import pytest
import torch

from bilevel import SGD, AdamW
from weighting import InstanceNet, NetTravel, Unbounded

EXAMPLES, STEPS, FEATURES = 6, 3, 4


def make(*, centre=True, optimizer=lambda rates: AdamW(rates, weight_decay=0.0), layers=1):
    generator = torch.Generator().manual_seed(0)
    net = InstanceNet(FEATURES, 5, layers, bound=Unbounded(), centre=centre, normalise=False)
    batch = {
        "features": torch.randn(EXAMPLES, STEPS, FEATURES, generator=generator),
        "feature_mask": torch.arange(STEPS) < torch.tensor([[1], [2], [3], [3], [2], [1]]),
    }
    return NetTravel(net, net.init(generator), batch, optimizer, lambda step: 1.0)


def hidden(travel):
    """What the last layer multiplies, averaged over the steps of an example, [examples, 5]."""
    params = {name: leaf.double() for name, leaf in travel.params.items()}
    x, mask = travel.batch["features"].double(), travel.batch["feature_mask"]
    x = torch.nn.functional.leaky_relu(x @ params["hidden.0.weight"].T + params["hidden.0.bias"])
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("centre", [False, True])
def test_the_first_step_of_sgd_in_closed_form(centre):
    """The last layer is 0, so only it moves: r = H w, s the leading left singular vector of H."""
    h = hidden(made := make(centre=centre, optimizer=SGD))
    h = h - h.mean(0) if centre else h
    u, singular, _ = torch.linalg.svd(h)
    expected = 0.3 * float((u[:, 0] * singular[0] ** 2).abs().max())  # lr H Hᵀ s
    assert made.distance(1, 0.3) == pytest.approx(expected, rel=1e-9)


def test_the_first_step_of_adam_moves_every_parameter_by_the_rate():
    h = hidden(made := make())
    h = h - h.mean(0)
    direction = torch.linalg.svd(h).U[:, 0]
    moved = h @ (0.01 * torch.sign(h.T @ direction))
    assert made.distance(1, 0.01) == pytest.approx(float(moved.abs().max()), rel=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_run_is_that_of_torchs_adam(layers):
    made = make(layers=layers)
    params = {name: leaf.double().requires_grad_() for name, leaf in made.params.items()}
    batch = {"features": made.batch["features"].double(), "mask": made.batch["feature_mask"]}

    def raw():
        found = made.weighting.raw_weights(params, *batch.values())
        return found - found.mean()

    start = raw()
    jacobian = torch.stack(
        [
            torch.cat(
                [
                    grad.flatten()
                    for grad in torch.autograd.grad(one, params.values(), retain_graph=True)
                ]
            )
            for one in start
        ]
    )
    direction = torch.linalg.svd(jacobian).U[:, 0]
    adam = torch.optim.AdamW(params.values(), lr=0.02, weight_decay=0.0)
    for _ in range(40):
        adam.zero_grad()
        (direction * raw()).sum().backward()
        adam.step()
    expected = float((raw() - start).detach().abs().max())
    assert made.distance(40, 0.02) == pytest.approx(expected, rel=1e-6)


def test_long_runs_are_taken_in_fewer_steps():
    """600 steps in 256: the sums of rates are those of all steps."""
    made = make()
    whole = make()
    object.__setattr__(whole, "shares", lambda step: 1.0)
    short = made.distance(256, 0.001)
    assert made.distance(512, 0.0005) == pytest.approx(short, rel=1e-12)


@pytest.mark.parametrize("target", [0.5, 3.0])
def test_the_rate_for_a_distance_reaches_it(target):
    made = make()
    peak = made.peak_for(50, target)
    assert peak == float(f"{peak:.2g}")
    assert made.distance(50, 0.9 * peak) < target < made.distance(50, 1.1 * peak)


def test_noise_moves_less_than_one_direction():
    made = make()
    assert 0.0 < made.distance(200, 0.01, by_noise=True) < 0.3 * made.distance(200, 0.01)
    assert made.distance(200, 0.01, by_noise=True) == made.distance(200, 0.01, by_noise=True)


def test_features_that_do_not_differ_move_nothing():
    made = make()
    made.batch["features"][:] = 1.0
    assert made.distance(10, 0.1) == pytest.approx(0.0, abs=1e-12)
    assert made.peak_for(10, 1.0) == 0.0
    assert math.isfinite(made.distance(10, 0.1, by_noise=True))
