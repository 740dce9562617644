from __future__ import annotations

import math
from inspect import unwrap
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prm import aggregations
from prm.aggregations import AGGREGATIONS
from prm.names import AggregationName
from tests.prm.tiny import FORWARD_MODE


def logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


PLAIN = {
    "mean": lambda scores: sum(scores) / len(scores),
    "minimum": min,
    "maximum": max,
    "last": lambda scores: scores[-1],
    "product": math.prod,
    "log_mean": lambda scores: math.exp(sum(map(math.log, scores)) / len(scores)),
    "logit_mean": lambda scores: 1 / (1 + math.exp(-sum(map(logit, scores)) / len(scores))),
    "logit_sum": lambda scores: 1 / (1 + math.exp(-sum(map(logit, scores)))),
}
NAMES = sorted(PLAIN)
SCORES = st.lists(st.floats(1e-6, 1 - 1e-6), min_size=1, max_size=6)


def test_every_name_of_the_command_line_has_its_function():
    assert tuple(AGGREGATIONS) == get_args(AggregationName)
    functions = {"min": "minimum", "max": "maximum"}
    assert sorted(functions.get(name, name) for name in AGGREGATIONS) == NAMES
    for name, how in AGGREGATIONS.items():
        assert how is unwrap(getattr(aggregations, functions.get(name, name)))


@pytest.mark.parametrize("name", NAMES)
@given(rows=st.lists(SCORES, min_size=1, max_size=4))
def test_equals_plain_python_whatever_the_mask_hides(name, rows):
    steps = max(map(len, rows)) + 1
    scores = torch.full((len(rows), steps), math.nan, dtype=torch.float64)
    mask = torch.zeros(len(rows), steps, dtype=torch.bool)
    for place, row in enumerate(rows):
        scores[place, : len(row)] = torch.tensor(row, dtype=torch.float64)
        mask[place, : len(row)] = True
    expected = torch.tensor([PLAIN[name](row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(getattr(aggregations, name)(scores, mask), expected)


@FORWARD_MODE
@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name):
    aggregation = getattr(aggregations, name)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]]).bool()
    assert torch.autograd.gradcheck(lambda s: aggregation(s, mask), scores, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda s: aggregation(s, mask), scores)
    (gradient,) = torch.autograd.grad(aggregation(scores, mask).sum(), scores)
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_and_hidden_scores_stay_finite(name, dtype):
    rows = [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.5], [1e-30, 1.0, math.nan]]
    scores = torch.tensor(rows, dtype=dtype, requires_grad=True)
    mask = ~scores.detach().isnan()
    values = getattr(aggregations, name)(scores, mask)
    (gradient,) = torch.autograd.grad(values.sum(), scores)
    assert values.isfinite().all()
    assert ((values >= 0) & (values <= 1)).all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(values[:2], torch.tensor([0.0, 1.0], dtype=dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_step_gives_nan(name):
    scores = torch.tensor([[0.5, 0.5], [0.25, 0.5]], requires_grad=True)
    mask = torch.tensor([[False, False], [True, False]])
    values = getattr(aggregations, name)(scores, mask)
    assert values[0].isnan()
    torch.testing.assert_close(values[1], torch.tensor(0.25))


def test_tied_steps_share_the_gradient_of_the_extreme():
    scores = torch.tensor([[0.25, 0.25, 0.5]], requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(aggregations.minimum(scores, mask).sum(), scores)
    assert gradient.tolist() == [[0.5, 0.5, 0.0]]


def test_log_odds_by_hand():
    # Odds 4, 1/2 and 9: their product is 18, their geometric mean 18^(1/3).
    scores = torch.tensor([[0.8, 1 / 3, 0.9]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    mean = 18 ** (1 / 3)
    assert aggregations.logit_sum(scores, mask).item() == pytest.approx(18 / 19, rel=1e-12)
    assert aggregations.logit_mean(scores, mask).item() == pytest.approx(mean / (1 + mean))
