"""Passes of a step draw from one random state."""

from __future__ import annotations

import pytest
import torch

from bilevel import SGD, AdamW, BilevelSolver, OneStep
from bilevel.autodiff import random_state
from tests.bilevel.zoo import build


def test_rewinding_gives_the_same_numbers_and_leaves_no_trace():
    start = random_state.capture({})
    first = torch.rand(3)
    moved = torch.get_rng_state()
    with random_state.rewound_to(start, {}):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), moved)


def test_rewinding_cleans_up_after_an_error():
    start = random_state.capture({})
    torch.rand(3)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), random_state.rewound_to(start, {}):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
@pytest.mark.parametrize("rollback", [False, True])
def test_a_step_draws_as_many_numbers_with_as_without_upper_level(order, rollback):
    case = build("dropout")
    solver = BilevelSolver(
        case.problem, AdamW(0.1), SGD(0.1), OneStep(order=order), rollback=rollback
    )
    state = solver.init(case.params, case.upper_params)
    ends = []
    for upper_batch in (None, case.upper_batch):
        torch.manual_seed(7)
        solver.step(state, [case.batch], upper_batch)
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)
