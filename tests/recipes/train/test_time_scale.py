"""Time scale: the simulated row equals a real optimizer, auto reaches the bound exactly."""

from __future__ import annotations

import math

import pytest
import torch

from recipes.train.time_scale import distance_to_lower_bound, match_time_scale, row_travel
from weighting import Clip, LeakyReLU, Sigmoid, Softplus


@pytest.mark.parametrize("visit_every", [1, 4, 30])
def test_simulated_row_equals_torch_adam(visit_every):
    row = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([row], lr=0.1)
    for step in range(200):
        row.grad = torch.full_like(row, -1.0 if step % visit_every == 0 else 0.0)
        adam.step()
    travelled = row_travel(200, visit_every, lambda step: 0.1, optimizer="adam")
    assert travelled == pytest.approx(float(row.detach()), rel=1e-9)


def test_lazy_adam_moves_one_learning_rate_per_visit():
    assert row_travel(1000, 10, lambda step: 0.01, optimizer="lazy-adam") == pytest.approx(
        100 * 0.01, rel=1e-6
    )
    assert row_travel(1000, 10, lambda step: 0.01, optimizer="sgd") == pytest.approx(100 * 0.01)


def test_dense_adam_moves_a_rare_row_about_28_learning_rates_per_visit():
    # 1,000 instances at one a step: the figure behind DreamPRM-1.5's learning rate.
    per_visit = row_travel(20_000, 1000, lambda step: 1.0, optimizer="adam") / 20
    assert 20 < per_visit < 32


@pytest.mark.parametrize("optimizer", ["adam", "lazy-adam", "sgd"])
def test_auto_learning_rate_just_reaches_the_bound(optimizer):
    def scale(lr):
        return match_time_scale(
            upper_lr=lr,
            upper_steps=300,
            rows=600,
            rows_per_step=32,
            to_bound=1.0,
            schedule_of=lambda peak: lambda step: peak * (1 - step / 300),
            optimizer=optimizer,
            betas=(0.9, 0.999),
        )

    auto = scale(None)
    assert auto.reachable == pytest.approx(1.0, rel=1e-12)
    assert auto.visits == pytest.approx(16.0)
    assert auto.warning() is None
    assert "hardly move" in str(scale(auto.upper_lr / 10).warning())
    assert "slam" in str(scale(auto.upper_lr * 10).warning())


def test_distance_to_the_lower_bound():
    for bound, expected in [
        (Clip(0.0, 2.0), 1.0),
        (Clip(-1.0, 3.0), 2.0),
        (LeakyReLU(0.0), 1.0),
        (Sigmoid(2.0), math.log(0.95 / 0.05)),
        (Softplus(), Softplus().raw(1.0) - Softplus().raw(0.1)),
        (LeakyReLU(0.01), math.inf),
    ]:
        assert distance_to_lower_bound(bound.range, bound.raw) == pytest.approx(expected)


def test_distance_is_from_the_prior():
    clip = Clip(1.2, 2.0)  # a bound that weight 1 is outside of
    assert distance_to_lower_bound(clip.range, clip.raw, 1.5) == pytest.approx(0.3)
