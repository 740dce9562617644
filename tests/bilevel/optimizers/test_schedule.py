"""Schedules: parity with transformers, shape of the curve, errors."""

from __future__ import annotations

import pickle

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from bilevel.optimizers.schedule import Constant, StepDecay, WarmupCosine


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (5, 40), (1, 1), (7, 8), (10, 10)])
def test_warmup_cosine_is_that_of_transformers(warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    schedule = WarmupCosine(0.3, warmup, total)
    for step in range(total + 1):
        assert schedule(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-14, abs=1e-18)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(("every", "factor"), [(1, 0.5), (3, 0.95), (50, 0.1)])
def test_step_decay_is_that_of_torch(every: int, factor: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, every, factor)
    schedule = StepDecay(0.3, every, factor)
    for step in range(20):
        assert schedule(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-14)
        optimizer.step()
        reference.step()
    counts = torch.arange(20)
    assert schedule(counts).tolist() == pytest.approx([schedule(k) for k in range(20)], rel=1e-14)
    assert schedule(counts).dtype == torch.float64


@pytest.mark.parametrize("wrong", [(-1.0, 1, 0.5), (1.0, 0, 0.5), (1.0, 1, 0.0), (1.0, 1, 1.5)])
def test_step_decay_refuses(wrong: tuple[float, int, float]) -> None:
    with pytest.raises(ValueError, match="StepDecay"):
        StepDecay(*wrong)


def test_curve_with_floor() -> None:
    schedule = WarmupCosine(1.0, 4, 12, floor=0.2)
    assert [schedule(k) for k in (0, 1, 2, 4)] == [0.0, 0.25, 0.5, 1.0]
    assert schedule(8) == pytest.approx(0.6, rel=1e-15)
    assert schedule(12) == schedule(13) == schedule(1000) == 0.2


def test_tensor_counts() -> None:
    schedule = WarmupCosine(0.3, 5, 20, floor=0.01)
    counts = torch.arange(25)
    assert schedule(counts).tolist() == pytest.approx([schedule(k) for k in range(25)], rel=1e-14)
    assert schedule(counts).dtype == torch.float64


def test_constant() -> None:
    assert Constant(0.1)(0) == Constant(0.1)(torch.tensor(7)) == 0.1


def test_schedules_are_values() -> None:
    schedule = WarmupCosine(0.1, 2, 10)
    assert schedule == WarmupCosine(0.1, 2, 10, floor=0.0) != WarmupCosine(0.1, 2, 11)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert repr(Constant(0.5)) == "Constant(lr=0.5)"
    assert repr(schedule) == ("WarmupCosine(peak=0.1, warmup_steps=2, total_steps=10, floor=0.0)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1.0), r"Constant: lr must lie in \[0, inf\), got -1\.0"),
        (lambda: Constant(float("nan")), r"Constant: lr .* got nan"),
        (lambda: WarmupCosine(-0.1, 0, 1), r"WarmupCosine: peak .* \[0, inf\), got -0\.1"),
        (lambda: WarmupCosine(0.1, 0, 0), r"total_steps must lie in \[1, inf\), got 0"),
        (lambda: WarmupCosine(0.1, 11, 10), r"warmup_steps must lie in \[0, 10\], got 11"),
        (lambda: WarmupCosine(0.1, 1, 10, 0.2), r"floor must lie in \[0, 0\.1\], got 0\.2"),
    ],
)
def test_errors_name_field_value_and_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
