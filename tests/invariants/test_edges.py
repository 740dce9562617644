"""Weights pushed past an edge, 16-bit sums, and other places where a plausible step goes wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bilevel import (
    SGD,
    Adam,
    AdamW,
    Auto,
    BilevelProblem,
    Dot,
    Ghost,
    Jvp,
    LazyRowAdam,
    OneStep,
    Penalty,
    PerExample,
    Refusal,
    Reverse,
    ReweightingProblem,
    Unrolled,
)
from bilevel.lower.lower_pass import lower_pass
from tests.bilevel.run_window import run_window
from weighting import Clip, DomainTable, InstanceNet, InstanceTable, LeakyReLU, Unbounded

F64 = torch.float64


def regression():
    """Four rows, two of whose raw weights lie past an edge of the bound on either side."""
    torch.manual_seed(0)
    table = InstanceTable(4, bound=Clip(0.0, 2.0), normalise="none")
    problem = ReweightingProblem(
        lambda lower, batch: ((batch["x"] @ lower["w"] - batch["y"]).square(), None),
        lambda upper, batch, features: table.weights(upper, batch["row"]),
        lambda lower, upper, batch: (batch["x"] @ lower["w"] - batch["y"]).square().mean(),
    )
    lower = {"w": torch.randn(3, dtype=F64)}
    upper = {"deviation": torch.tensor([-1.5, -0.5, 1.5, 0.5], dtype=F64)}
    draw = lambda rows: {  # noqa: E731
        "x": torch.randn(rows, 3, dtype=F64),
        "y": torch.randn(rows, dtype=F64),
        "row": torch.arange(rows),
    }
    return problem, lower, upper, draw(4), draw(6)


def hypergradient(method, problem, steps=3):
    _, lower, upper, batch, upper_batch = regression()
    optimizer = SGD(0.05)
    return run_window(
        method,
        problem,
        optimizer,
        lower,
        upper,
        optimizer.init(lower),
        [[batch]] * steps,
        upper_batch,
        method.init(optimizer, lower, upper),
    ).hypergradient["deviation"]


def test_past_an_edge_every_route_sees_the_derivative_of_the_weight_itself():
    """A derivative that looked at its cotangent's sign was another one for every route."""
    problem, *_ = regression()
    # The same weights as a constant plus the raw weight's own deviation: derivative 1.
    table = InstanceTable(4, bound=Clip(0.0, 2.0), normalise="none")

    def weights(upper, batch, features):
        raw = table.raw_weights(upper)[batch["row"]]
        return raw + (raw.clamp(0.0, 2.0) - raw).detach()

    plain = replace(problem, weights=weights)
    attached = replace(problem, detach_features=False)
    general = BilevelProblem(problem.lower_loss, problem.upper_loss)
    for method in (
        *(OneStep(route) for route in (Auto(), PerExample(), Jvp(), Reverse())),
        OneStep(Ghost(), "upper-first"),
        *(Unrolled(product=product) for product in (Auto(), Jvp(), Reverse())),
        Penalty(5.0),
    ):
        steps = 1 if isinstance(method, OneStep) else 3
        expected = hypergradient(method, plain, steps)
        assert (expected[[0, 2]] != 0).all()
        for other in (problem, attached, general):
            if isinstance(method, OneStep) and isinstance(method.route, Ghost | PerExample):
                other = problem
            found = hypergradient(method, other, steps)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_decay_is_part_of_the_lower_loss_of_the_penalty():
    """With a lower loss ½(θ − φ)² + ½θ² the bias against (φ/2 − t)/2 is of order 1/λ."""
    problem = BilevelProblem(
        lambda lower, upper, batch: 0.5 * (lower["w"] - upper["p"]).square().sum(),
        lambda lower, upper, batch: 0.5 * (lower["w"] - batch).square().sum(),
    )
    lower, upper = {"w": torch.zeros(1, dtype=F64)}, {"p": torch.tensor([2.0], dtype=F64)}
    target, optimizer = torch.tensor([0.5], dtype=F64), SGD(0.3, weight_decay=1.0)
    errors = []
    for strength in (10.0, 100.0, 1000.0):
        method = Penalty(strength)
        found = run_window(
            method,
            problem,
            optimizer,
            lower,
            upper,
            optimizer.init(lower),
            [[None]] * 60,
            target,
            method.init(optimizer, lower, upper),
        )
        errors.append(abs(found.hypergradient["p"].item() - 0.25))
    assert errors[0] <= 0.02
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.2)
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.2)


def test_the_average_of_upper_gradients_does_not_stand_still_in_bfloat16():
    method, ones = OneStep(direction_decay=0.999), {"w": torch.ones(2, dtype=torch.bfloat16)}
    average = method.init(SGD(0.1), ones, None)
    for _ in range(300):
        used, average = method.averaged(ones, average)
    assert used["w"].dtype == torch.bfloat16
    assert used["w"].tolist() == [1.0, 1.0]
    assert average.average["w"].tolist() == pytest.approx([1 - 0.999**300] * 2, rel=1e-5)


def test_micro_batches_of_16_bits_are_summed_in_float32():
    """1,024 gradients of 1 in bfloat16: summed there they would stop at 256."""
    problem = BilevelProblem(
        lambda lower, upper, batch: lower["w"].sum(), lambda lower, upper, batch: lower["w"].sum()
    )
    lower = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    grads = lower_pass(problem, Jvp(), lower, {}, [None] * 1024).grads
    assert grads["w"].dtype == torch.bfloat16
    assert grads["w"].tolist() == [1.0, 1.0]
    weighted, *_ = regression()
    row = {"x": torch.ones(1, 1, dtype=F64), "y": torch.zeros(1, dtype=F64), "row": torch.ones(1)}
    row = {name: value.to(torch.bfloat16) for name, value in row.items()}
    weighted = replace(weighted, weights=lambda upper, batch, features: upper["v"].expand(1))
    upper = {"v": torch.tensor(0.5)}
    grads = lower_pass(
        weighted, Dot(), {"w": torch.ones(1, dtype=torch.bfloat16)}, upper, [row] * 1024
    ).grads
    assert grads["w"].tolist() == [1.0]


def test_an_empty_micro_batch_contributes_nothing_and_a_step_without_examples_is_named():
    problem = BilevelProblem(
        lambda lower, upper, batch: lower["w"].sum(),
        lambda lower, upper, batch: lower["w"].sum(),
        batch_size=len,
    )
    params = {"w": torch.zeros(2)}
    passed = lower_pass(problem, Jvp(), params, {}, [[], [1], []])
    assert passed.grads["w"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="at least 1 example in the 2 micro-batches"):
        lower_pass(problem, Jvp(), params, {}, [[], []])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_prediction_before_the_first_gradient_is_plain_descent(dtype):
    """Even where the derivative of Adam at 0, 1/eps, is more than the precision holds."""
    eps = {torch.float16: 1e-5, torch.float32: 1e-37}[dtype]
    optimizer, params = Adam(0.5, eps=eps), {"w": torch.ones(3, dtype=dtype)}
    state = optimizer.init(params)
    assert optimizer.predicted_grads_vjp(state, params, params)["w"].tolist() == [-0.5] * 3


def test_an_eps_that_is_lost_in_the_derivative_is_refused():
    half = {"w": torch.ones(3, dtype=torch.float16)}
    with pytest.raises(ValueError, match=r"Adam: eps=5e-07 is lost in torch.float16.*state_dtype"):
        Adam(0.1, eps=5e-7).init(half)
    with pytest.raises(
        ValueError, match=r"LazyRowAdam: eps=1e-08 is lost in torch.float16.*float32"
    ):
        LazyRowAdam(0.1).init(half)
    AdamW(0.1, eps=1e-6).init(half)


def test_rows_counted_from_the_end_are_left_to_jvp():
    torch.manual_seed(0)
    lower = {"table": torch.randn(5, 3, dtype=F64)}

    def losses(params, batch):
        return params["table"][batch["at"]].square().sum(-1), None

    problem = ReweightingProblem(
        losses,
        lambda upper, batch, features: upper["v"],
        lambda params, upper, batch: losses(params, batch)[0].mean(),
    )
    batch, upper = {"at": torch.tensor([-1, 2, 4])}, {"v": torch.ones(3, dtype=F64)}
    optimizer = SGD(0.1)

    def run(route):
        method = OneStep(route)
        state = optimizer.init(lower)
        return run_window(method, problem, optimizer, lower, upper, state, [[batch]], batch)

    torch.testing.assert_close(run(Auto()).hypergradient, run(Jvp()).hypergradient)
    with pytest.raises(Refusal, match="PerExample"):
        run(PerExample())


def test_weightings_that_could_never_move_are_refused():
    for bound in (LeakyReLU(), Unbounded(), Clip(0.0, 2.0)):
        with pytest.raises(ValueError, match=r"DomainTable: .* not positive.*Softplus"):
            DomainTable(3, bound=bound)
    net = InstanceNet(2, normalise=False)
    with pytest.raises(ValueError, match="InstanceNet: centre needs at least two examples"):
        net.weights(net.init(), torch.ones(1, 4, 2), torch.ones(1, 4, dtype=torch.bool))
