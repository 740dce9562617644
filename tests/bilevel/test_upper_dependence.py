"""What φ does besides the lower loss: it sets numbers of the optimizer and the start of θ."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bilevel import (
    SGD,
    Adam,
    AdamW,
    BilevelProblem,
    BilevelSolver,
    Implicit,
    OneStep,
    Unrolled,
    tree,
)
from bilevel.optimizers.optimizers import RMSProp
from bilevel.optimizers.variants import NAdam

STEPS = 4
UNROLLED = Unrolled()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(theta, x: Tensor) -> Tensor:
    return torch.tanh(x @ theta["body.w"] + theta["body.b"]) @ theta["head.w"]


def error(theta, phi, batch) -> Tensor:
    """A loss that looks at φ where φ has a weight."""
    found = (network(theta, batch[0]) - batch[1]).square()
    return (found * phi["weights"].exp()).mean() if "weights" in phi else found.mean()


def upper_error(theta, phi, batch) -> Tensor:
    return (network(theta, batch[0]) - batch[1]).square().mean()


THETA = {"body.w": draw(1, 3, 4), "body.b": draw(2, 4), "head.w": draw(3, 4)}
BATCHES = [[(draw(10 + k, 5, 3), draw(20 + k, 5))] for k in range(STEPS)]
UPPER = (draw(30, 6, 3), draw(31, 6))
PROBLEM = BilevelProblem(error, upper_error)


def part(name: str) -> str:
    return name.partition(".")[0]


def value(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


CASES = {
    "rate and decay per group, through AdamW": (
        AdamW(
            0.1,
            (0.8, 0.9),
            1e-3,
            weight_decay=0.1,
            group=part,
            max_norm=0.5,
            differentiate_clip=True,
        ),
        {"body": value(-2.0), "head": value(-3.0), "decay": draw(6, 2)},
        lambda phi: {
            "lr": {"body": phi["body"].exp(), "head": phi["head"].exp()},
            "weight_decay": {"body": phi["decay"][0].exp(), "head": phi["decay"][1].exp()},
        },
    ),
    "betas of Adam": (
        Adam(0.1, (0.8, 0.9), 1e-3),
        {"betas": draw(7, 2), "log_lr": value(-2.0)},
        lambda phi: {"betas": phi["betas"].sigmoid(), "lr": phi["log_lr"].exp()},
    ),
    "momentum of Nesterov": (
        SGD(0.1, 0.5, nesterov=True),
        {"momentum": value(0.3), "decay": value(-3.0)},
        lambda phi: {"momentum": phi["momentum"].sigmoid(), "weight_decay": phi["decay"].exp()},
    ),
    "beta of RMSProp": (
        RMSProp(0.1, beta=0.5, eps=1e-3),
        {"beta": value(0.3)},
        lambda phi: {"beta": phi["beta"].sigmoid()},
    ),
    "rate of NAdam": (
        NAdam(0.1, eps=1e-3),
        {"log_lr": value(-2.0)},
        lambda phi: {"lr": phi["log_lr"].exp()},
    ),
}
ROUTES = {
    "unrolled": Unrolled(),
    "recomputed": Unrolled(replay="sqrt", store="host"),
    "truncated": Unrolled(steps=2),
    "one step": OneStep(),
}


def solver_of(optimizer, hyperparameters, hypergradient=UNROLLED, **rest):
    return BilevelSolver(
        PROBLEM,
        optimizer,
        SGD(0.1),
        hypergradient,
        unroll_steps=STEPS,
        hyperparameters=hyperparameters,
        **rest,
    )


def hypergradient_of(solver, state, batches=BATCHES, upper=UPPER):
    """What SGD with rate 0.1 subtracts from φ, divided by the rate."""
    new, infos = solver.window(state, batches, upper)
    moved = tree.axpy(-1.0, new.upper_params, state.upper_params)
    return tree.scale(10.0, moved), infos


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", CASES)
def test_the_derivative_with_respect_to_numbers_is_a_central_difference(case, route) -> None:
    """The steps that a hypergradient does not go through are those of the unmoved φ."""
    optimizer, phi, hyperparameters = CASES[case]
    phi = phi | {"weights": draw(5, 5)}
    solver = solver_of(optimizer, hyperparameters, ROUTES[route])
    found, _ = hypergradient_of(solver, solver.init(THETA, phi))
    constant = {"truncated": 2, "one step": STEPS - 1}.get(route, 0)

    def after(moved) -> float:
        state = plain.init(THETA, phi)
        for index, batches in enumerate(BATCHES):
            state = state._replace(upper_params=phi if index < constant else moved)
            state, _ = plain.window(state, [batches])
        return upper_error(state.lower_params, moved, UPPER).item()

    plain = replace(solver, unroll_steps=1, hypergradient=OneStep())
    for path, leaf in tree.flatten(phi).items():
        for index in range(leaf.numel()):
            ends = []
            for sign in (1.0, -1.0):
                moved = {name: one.clone() for name, one in phi.items()}
                moved[path].view(-1)[index] += sign * 1e-5
                ends.append(after(moved))
            assert found[path].view(-1)[index].item() == pytest.approx(
                (ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9
            ), f"{path}[{index}]"


def test_numbers_from_phi_give_the_steps_of_an_optimizer_that_has_them() -> None:
    phi = {"log_lr": value(math.log(0.03))}
    solver = solver_of(AdamW(0.1), lambda phi: {"lr": phi["log_lr"].exp()})
    plain = BilevelSolver(PROBLEM, AdamW(phi["log_lr"].exp().item()), SGD(0.1), unroll_steps=STEPS)
    one, _ = solver.window(solver.init(THETA, phi), BATCHES)
    other, _ = plain.window(plain.init(THETA, {}), BATCHES)
    for name, leaf in one.lower_params.items():
        assert torch.equal(leaf, other.lower_params[name])


def adapted(theta, batches, rate: float):
    """Gradient steps whose graph reaches to the start (MAML, by double backward)."""
    for (batch,) in batches:
        grads = torch.autograd.grad(
            upper_error(theta, {}, batch), list(theta.values()), create_graph=True
        )
        theta = {
            name: leaf - rate * g for (name, leaf), g in zip(theta.items(), grads, strict=True)
        }
    return theta


def maml(**rest) -> BilevelSolver:
    problem = BilevelProblem(lambda theta, phi, batch: upper_error(theta, phi, batch), upper_error)
    return BilevelSolver(
        problem,
        SGD(0.2),
        SGD(0.1),
        Unrolled(),
        unroll_steps=STEPS,
        initial=lambda phi: {name: phi[name] for name in THETA},
        **rest,
    )


TASKS = [
    ([[(draw(100 * t + k, 5, 3), draw(100 * t + 50 + k, 5))] for k in range(STEPS)],
     (draw(100 * t + 80, 6, 3), draw(100 * t + 90, 6)))
    for t in (1, 2, 3)
]  # fmt: skip


def test_the_derivative_with_respect_to_the_start_is_mamls() -> None:
    """By double backward through hand-written steps, for each task and for their mean."""
    solver = maml()
    state = solver.init(None, THETA)
    wanted = []
    for batches, upper in TASKS:
        start = {name: leaf.clone().requires_grad_() for name, leaf in THETA.items()}
        loss = upper_error(adapted(start, batches, 0.2), {}, upper)
        wanted.append(torch.autograd.grad(loss, list(start.values())))
        found, infos = hypergradient_of(solver, state, batches, upper)
        for leaf, expected in zip(found.values(), wanted[-1], strict=True):
            torch.testing.assert_close(leaf, expected, rtol=1e-11, atol=1e-13)
        assert infos[-1].upper_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    new, infos = solver.meta_batch(state, TASKS)
    for index, name in enumerate(THETA):
        mean = sum(grads[index] for grads in wanted) / len(TASKS)
        moved = (THETA[name] - new.upper_params[name]) / 0.1
        torch.testing.assert_close(moved, mean, rtol=1e-11, atol=1e-13)
    assert [len(of_task) for of_task in infos] == [STEPS] * 3
    assert (int(new.lower_steps), int(new.upper_steps)) == (3 * STEPS, 1)


def test_every_window_starts_anew_from_phi() -> None:
    solver = replace(maml(), lower_optimizer=Adam(0.1))
    state, _ = solver.window(solver.init(None, THETA), *TASKS[0])
    again, _ = solver.window(state, TASKS[1][0])
    fresh, _ = solver.window(solver.init(None, state.upper_params), TASKS[1][0])
    for one, other in zip(
        tree.leaves((again.lower_params, again.lower_optimizer)),
        tree.leaves((fresh.lower_params, fresh.lower_optimizer)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_start_and_numbers_are_learned_together() -> None:
    """Meta-SGD (arXiv 1707.09835): a central difference along every entry of the rates."""
    phi = THETA | {"rates": draw(40, 2) - 2.0}
    solver = replace(
        maml(),
        lower_optimizer=SGD({"body": 0.1, "head": 0.1}, 0.5, group=part),
        hyperparameters=lambda phi: {
            "lr": {"body": phi["rates"][0].exp(), "head": phi["rates"][1].exp()}
        },
    )
    found, _ = hypergradient_of(solver, solver.init(None, phi), *TASKS[0])
    direction = tree.map(lambda leaf: torch.cos(leaf * 7.0), phi)
    ends = []
    for sign in (1.0, -1.0):
        moved = tree.axpy(sign * 1e-5, direction, phi)
        state, _ = solver.window(solver.init(None, moved), TASKS[0][0])
        ends.append(upper_error(state.lower_params, moved, TASKS[0][1]).item())
    along = tree.vdot(found, direction).item()
    assert along == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: solver_of(SGD(0.1), lambda phi: {}, Implicit()),
            "Implicit does not differentiate through the lower optimizer",
        ),
        (
            lambda: solver_of(SGD(0.1), lambda phi: {}, OneStep(order="upper-first")),
            "OneStep does not differentiate through the lower optimizer",
        ),
        (
            lambda: replace(maml(), hypergradient=OneStep(), unroll_steps=1),
            r"OneStep does not differentiate through a whole window; choose Unrolled\(\)",
        ),
        (
            lambda: replace(maml(), hypergradient=Unrolled(steps=2)),
            "Unrolled does not differentiate through a whole window",
        ),
        (lambda: replace(maml(), upper_start=3), "upper_start=3 has no effect with initial"),
        (
            lambda: solver_of(SGD(0.1), None).init(None, {}),
            "lower_params: expected θ, found None",
        ),
        (
            lambda: solver_of(SGD(0.1), None).meta_batch(None, TASKS),
            r"meta_batch: expected a solver with initial .*found initial=None",
        ),
        (lambda: maml().meta_batch(None, []), "at least one task; found .* and 0 tasks"),
    ],
)
def test_what_cannot_be_learned_is_refused_at_the_start(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
