"""Time scale: the simulated row equals a real optimizer, auto reaches the bound exactly."""

from __future__ import annotations

import math

import pytest
import torch

from recipes.method.bounded_weights import make_weighting
from recipes.method.time_scale import (
    UpperMovement,
    distance_to_lower_bound,
    match_time_scale,
    print_time_scale,
    row_travel,
    time_scale,
)
from recipes.options.parse import train_options
from weighting import Clip, LeakyReLU, Sigmoid, Softplus


def flat(step: int) -> float:
    """The peak learning rate at every step."""
    return 1.0


@pytest.mark.parametrize("visit_every", [1, 4, 30])
def test_simulated_row_equals_torch_adam(visit_every):
    row = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([row], lr=0.1)
    for step in range(200):
        row.grad = torch.full_like(row, -1.0 if step % visit_every == 0 else 0.0)
        adam.step()
    travelled = row_travel(UpperMovement(200, lambda step: 0.1, "adam", visit_every=visit_every))
    assert travelled == pytest.approx(float(row.detach()), rel=1e-9)


def test_lazy_adam_moves_one_learning_rate_per_visit():
    lazy = UpperMovement(1000, flat, "lazy-adam", visit_every=10)
    assert row_travel(lazy) == pytest.approx(100, rel=1e-6)
    assert row_travel(UpperMovement(1000, flat, "sgd", visit_every=10)) == pytest.approx(100)


def test_dense_adam_moves_a_rare_row_about_28_learning_rates_per_visit():
    # 1,000 instances at one a step: the figure behind DreamPRM-1.5's learning rate.
    per_visit = row_travel(UpperMovement(20_000, flat, "adam", visit_every=1000)) / 20
    assert 20 < per_visit < 32


@pytest.mark.parametrize("optimizer", ["adam", "lazy-adam", "sgd"])
def test_auto_learning_rate_just_reaches_the_bound(optimizer, capsys):
    upper = UpperMovement(300, lambda step: 1 - step / 300, optimizer, visit_every=600 / 32)
    auto = match_time_scale(upper, 1.0, None)
    assert auto.reachable == pytest.approx(1.0, rel=1e-12)
    assert auto.visits == pytest.approx(16.0)
    assert auto.warnings() == []
    assert "hardly move" in str(match_time_scale(upper, 1.0, auto.upper_lr / 10).warnings())
    print_time_scale(match_time_scale(upper, 1.0, auto.upper_lr * 10))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "time scale"
    assert shown[5] == "  reachable distance                  10"
    assert shown[-1].startswith("warning: weights can travel 10, the bound is only 1 away")
    assert "slam" in shown[-1]


def test_a_given_learning_rate_travels_in_proportion():
    upper = UpperMovement(300, flat, "sgd", visit_every=3)
    scale = match_time_scale(upper, math.inf, 0.5)
    assert (scale.visits, scale.reachable, scale.per_visit) == (100.0, 50.0, 0.5)
    assert scale.warnings() == []  # nothing to slam into
    assert match_time_scale(upper, math.inf, None).upper_lr == pytest.approx(0.01)


def test_distance_to_the_lower_bound():
    for bound, expected in [
        (Clip(0.0, 2.0), 1.0),
        (Clip(-1.0, 3.0), 2.0),
        (LeakyReLU(0.0), 1.0),
        (Sigmoid(2.0), math.log(0.95 / 0.05)),
        (Softplus(), Softplus().raw(1.0) - Softplus().raw(0.1)),
        (LeakyReLU(0.01), math.inf),
    ]:
        assert distance_to_lower_bound(bound) == pytest.approx(expected)


def test_distance_is_from_the_prior():
    clip = Clip(1.2, 2.0)  # a bound that weight 1 is outside of
    assert distance_to_lower_bound(clip, 1.5) == pytest.approx(0.3)


def warnings(examples, **given):
    options = train_options(
        train_file="t", output_dir="o", weighting="table", upper_lr="auto", **given
    )
    weighting = make_weighting(options, examples, 0)
    return time_scale(options, weighting, examples, lambda: None).warnings()


def test_a_run_that_is_too_short_is_told_how_long_it_would_have_to_be():
    """20 steps of 8 of 240 rows: seen 0.67 times, and a warm-up whose first step is 1 of 20."""
    short = {"steps": 20, "batch_size": 8, "upper_start": 2, "lower_warmup": 0.05}
    visits, passes, idle = warnings(240, **short)
    assert visits.startswith("upper steps visit each row 0.6 times")
    assert "5 visits take --steps 152" in visits  # 2, and 5 visits, each every 30 steps
    assert passes == (
        "20 steps train on 67% of the examples, the others are never seen: --steps 30 see each "
        "of them once"
    )
    assert idle.startswith("--lower-warmup: the learning rate of the first 1 of 20 steps is 0")
    assert "take 21 steps" in idle
    assert not warnings(240, **short | {"steps": 152})
    (still,) = warnings(240, **short | {"steps": 151})
    assert "visit each row" in still


def test_the_warm_up_of_the_upper_level_counts_upper_steps():
    given = {"batch_size": 8, "upper_start": 0, "lower_warmup": 0.0, "steps": 100}
    few, idle = warnings(40, unroll_steps=5, upper_warmup=0.05, upper_schedule="cosine", **given)
    assert "each row 4 times" in few
    assert "--steps 125" in few  # one step of five is differentiated: 8 rows of 40
    assert idle.startswith("--upper-warmup: the learning rate of the first 1 of 20 steps is 0")
    assert not warnings(40, upper_warmup=0.05, upper_schedule="cosine", **given)
