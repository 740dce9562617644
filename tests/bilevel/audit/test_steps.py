"""φ that sets the lower optimizer's numbers or the start of θ: the audit moves them with φ."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from bilevel import (
    SGD,
    AdaDelta,
    Adam,
    Adamax,
    AdamW,
    BilevelProblem,
    BilevelSolver,
    Implicit,
    NAdam,
    OneStep,
    RAdam,
    RMSProp,
    Unrolled,
    check_hypergradient,
    compare_hypergradients,
)

UPPER = "the lower gradient is right, the hypergradient is wrong"


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Without(Unrolled):
    """Unrolled that leaves out, on purpose, what φ does by way of a field of the window."""

    field: str = "hyperparameters"

    def record(self, window, upper_batch, memory):
        return super().record(replace(window, **{self.field: None}), upper_batch, memory)


@dataclass(frozen=True)
class OneStepWithout(OneStep):
    def record(self, window, upper_batch, memory):
        return super().record(replace(window, hyperparameters=None), upper_batch, memory)


PROBLEM = BilevelProblem(
    lambda t, p, b: (torch.tanh(b @ t["w"]) - p["a"].exp()).square().mean() + t["v"].square().sum(),
    lambda t, p, b: ((b @ t["w"]) * t["v"].sum() - 1).square().mean(),
)
THETA = {"w": torch.linspace(-1, 1, 3, dtype=torch.float64), "v": torch.ones(2).double()}


def learned(phi):
    return {"lr": phi["lr"].exp(), "weight_decay": phi["decay"].exp()}


def audited(method, optimizer, hyperparameters=learned, initial=None, steps=1):
    solver = BilevelSolver(
        PROBLEM,
        optimizer,
        SGD(1.0),
        method,
        unroll_steps=steps,
        hyperparameters=hyperparameters,
        initial=initial,
    )
    phi = {"a": torch.tensor(0.1), "lr": torch.tensor(-3.0), "decay": torch.tensor(-2.0)}
    state = solver.init(THETA, phi | {name: leaf + 0.1 for name, leaf in THETA.items()})
    batches = [[torch.randn(4, 3)] for _ in range(steps)]
    for _ in range(2):
        state, _ = solver.advance(state, batches)
    at_once = batches if steps > 1 else batches[0]
    return check_hypergradient(solver, state, at_once, torch.randn(4, 3), directions=2)


OPTIMIZERS = [
    SGD(0.1, momentum=0.9, max_norm=0.5),
    Adam(0.1, max_norm=1.0, differentiate_clip=True),
    AdamW(0.1),
    NAdam(0.1),
    RAdam(0.1),
    Adamax(0.1),
    AdaDelta(0.1),
    RMSProp(0.1),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("method", [OneStep(), Unrolled(), Unrolled(steps=2)], ids=str)
def test_learned_rates_and_decays_agree(method, optimizer):
    check = audited(method, optimizer, steps=1 if isinstance(method, OneStep) else 3)
    assert check, check


def test_learned_rates_of_groups_and_betas_agree():
    def numbers(phi):
        return {"lr": phi["lr"].exp(), "betas": torch.stack([phi["lr"], phi["decay"]]).sigmoid()}

    check = audited(Unrolled(), Adam(0.1), numbers, steps=3)
    assert check, check


@pytest.mark.parametrize(("method", "steps"), [(OneStepWithout(), 1), (Without(), 3)], ids=str)
def test_numbers_of_the_optimizer_that_are_left_out_are_found(method, steps):
    check = audited(method, AdamW(0.1), steps=steps)
    assert check.outcome == "disagrees"
    assert UPPER in check.message
    assert check.relative_error > 1e-2


def start(phi):
    return {name: phi[name] for name in THETA}


def test_a_learned_start_agrees():
    for hyperparameters in (None, learned):
        check = audited(Unrolled(), Adam(0.1), hyperparameters, start, steps=3)
        assert check, check


def test_a_start_that_is_left_out_is_found():
    check = audited(Without(field="initial"), Adam(0.1), learned, start, steps=3)
    assert check.outcome == "disagrees"
    assert UPPER in check.message
    assert check.relative_error > 1e-1


def test_numbers_out_of_range_at_a_coarse_step_leave_the_finer_ones():
    check = audited(Unrolled(), SGD(0.1), lambda phi: {"lr": phi["a"] * 1e-1}, steps=2)
    assert check.errors[0.1] == float("inf")
    assert check, check


def test_methods_are_compared_at_the_numbers_and_the_start_of_phi():
    def solver(method):
        return BilevelSolver(
            PROBLEM,
            SGD(0.1),
            SGD(1.0),
            method,
            unroll_steps=2,
            hyperparameters=learned,
            initial=start,
        )

    phi = {"a": torch.tensor(0.1), "lr": torch.tensor(-3.0), "decay": torch.tensor(-2.0)}
    state = solver(Unrolled()).init(THETA, phi | {n: leaf + 0.1 for n, leaf in THETA.items()})
    batches, upper = [[torch.randn(4, 3)]] * 2, torch.randn(4, 3)
    window = (state, batches, upper)
    methods = {"whole": Unrolled(), "again": Unrolled(replay=1), "without": Without()}
    found = compare_hypergradients(solver(Unrolled()), [window], methods)
    _, infos = solver(Unrolled()).window(state, batches, upper)
    assert found.norms[0][0] == pytest.approx(float(infos[-1].hypergradient_norm), rel=1e-12)
    assert found.mean("whole", "again").cosine == pytest.approx(1.0, abs=1e-12)
    assert found.mean("whole", "without").cosine < 0.999
    with pytest.raises(ValueError, match="Implicit does not differentiate through the lower"):
        compare_hypergradients(
            solver(Unrolled()), [window], {"whole": Unrolled(), "solved": Implicit()}
        )
