"""The alternation: trajectories bit for bit, accumulation, roll-back, schedules, checkpoints."""

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
    BilevelSolver,
    CentralDifference,
    Dot,
    Ghost,
    Implicit,
    Jvp,
    LazyRowAdam,
    OneStep,
    PerExample,
    Reverse,
    ReweightingProblem,
    Unrolled,
    WarmupCosine,
    tree,
)
from tests.bilevel.comparing import relative, same_bits
from tests.bilevel.run_window import run_step
from tests.bilevel.variants import cast, pick
from tests.bilevel.zoo import build
from tests.oracles import lower_gradient

LOWER = AdamW(WarmupCosine(0.05, 1, 20), weight_decay=0.1, max_norm=0.5)
STEPS = [
    OneStep(Auto()),
    OneStep(Auto(), "upper-first"),
    OneStep(Ghost(), "upper-first"),
    OneStep(PerExample()),
    OneStep(Jvp()),
    OneStep(Reverse(), "upper-first"),
    OneStep(CentralDifference()),
]


def trajectory(solver, case, batches, upper_batch, steps=3, upper_params=None):
    torch.manual_seed(5)
    upper_params = case.upper_params if upper_params is None else upper_params
    state = solver.init(case.params, upper_params)
    for _ in range(steps):
        state, info = solver.step(state, batches, upper_batch)
    return state, info


@pytest.mark.parametrize("one_step", STEPS, ids=str)
@pytest.mark.parametrize("name", ["mlp", "dropout", "encoder", "vision", "tiles"])
def test_with_an_upper_learning_rate_of_zero_training_is_as_without_upper_level(name, one_step):
    """Whatever the weights are, not only 1; in float32, where any other sum would show."""
    case = cast(build(name), torch.float32)
    solver = BilevelSolver(case.problem, LOWER, SGD(0.0), one_step)
    with_upper, info = trajectory(solver, case, [case.batch], case.upper_batch)
    without, _ = trajectory(solver, case, [case.batch], None)
    assert info.hypergradient_norm > 0.0
    assert same_bits(with_upper.lower_params, without.lower_params)
    assert same_bits(with_upper.lower_optimizer, without.lower_optimizer)
    assert same_bits(with_upper.upper_params, case.upper_params)
    assert int(with_upper.upper_steps) == 3
    assert int(without.upper_steps) == 0


@pytest.mark.parametrize("one_step", STEPS, ids=str)
@pytest.mark.parametrize("name", ["mlp", "dropout", "encoder", "vision", "tiles"])
def test_with_weights_of_one_training_is_plain_training(name, one_step):
    """A hand-written loop: mean loss, autograd, optimizer; dropout drawn from the same stream."""
    case = cast(build(name), torch.float32)
    ones = {"table": torch.ones(5), "scale": torch.ones(())}
    solver = BilevelSolver(case.problem, LOWER, SGD(0.0), one_step)
    found, _ = trajectory(solver, case, [case.batch], case.upper_batch, upper_params=ones)
    torch.manual_seed(5)
    params, state = case.params, LOWER.init(case.params)
    for _ in range(3):
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        case.problem.per_example_loss(leaves, case.batch)[0].mean().backward()
        grads = {name: leaf.grad for name, leaf in leaves.items()}
        with torch.no_grad():
            params, state = LOWER.update(grads, state, params)
    assert same_bits(found.lower_params, params)


@pytest.mark.parametrize("route", [Dot(), Auto(), Ghost(), Jvp()])
def test_single_examples_accumulated_are_plain_training_too(route):
    case = cast(build("mlp"), torch.float32)
    ones = {"table": torch.ones(5), "scale": torch.ones(())}
    solver = BilevelSolver(
        case.problem, LOWER, SGD(0.0), OneStep(route, "upper-first"), accumulation=2
    )
    pieces = [pick(case.batch, [0]), pick(case.batch, [3])]
    found, _ = trajectory(solver, case, pieces, case.upper_batch, 1, ones)
    grads = [lower_gradient(case.problem, case.params, ones, piece) for piece in pieces]
    mean = tree.map(lambda x, y: (x + y) / 2, *grads)
    expected, _ = LOWER.update(mean, LOWER.init(case.params), case.params)
    assert same_bits(found.lower_params, expected)


@pytest.mark.parametrize("one_step", STEPS[:5], ids=str)
def test_the_upper_step_follows_the_hypergradient(one_step):
    case = build("dropout")
    upper = SGD(0.7)
    solver = BilevelSolver(case.problem, LOWER, upper, one_step)
    state = solver.init(case.params, case.upper_params)
    state = state._replace(lower_optimizer=LOWER.update(case.params, *state[2:3], case.params)[1])
    torch.manual_seed(5)
    result = run_step(
        one_step, case.problem, LOWER, *state[:3], [case.batch], case.upper_batch, None
    )
    torch.manual_seed(5)
    new, info = solver.step(state, [case.batch], case.upper_batch)
    expected = tree.axpy(-0.7, result.hypergradient, case.upper_params)
    assert relative(new.upper_params, expected) <= 1e-14
    assert same_bits(new.lower_params, result.lower_params)
    assert float(info.hypergradient_norm) == float(tree.norm(result.hypergradient))
    assert float(info.upper_loss) == float(result.upper.loss)


def test_info():
    case = build("mlp")
    solver = BilevelSolver(
        case.problem, LOWER, SGD(0.1, max_norm=1e-9), OneStep(Jvp()), accumulation=2
    )
    state = solver.init(case.params, case.upper_params)
    pieces = [pick(case.batch, [0, 1, 2]), pick(case.batch, [3, 4])]
    _, info = solver.step(state, pieces, case.upper_batch)
    losses, _ = case.problem.per_example_loss(case.params, case.batch)
    torch.testing.assert_close(info.losses, losses.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(info.weights, 1.3 * case.upper_params["table"], rtol=1e-12, atol=0)
    expected = case.problem.lower_loss(case.params, case.upper_params, case.batch)
    torch.testing.assert_close(info.lower_loss, expected.detach(), rtol=1e-12, atol=0)
    grads = lower_gradient(case.problem, case.params, case.upper_params, case.batch)
    torch.testing.assert_close(info.lower_grad_norm, tree.norm(grads), rtol=1e-12, atol=0)
    assert bool(info.lower_clipped) == (float(tree.norm(grads)) > 0.5)
    assert bool(info.upper_clipped)
    unused, cold = info.notes
    assert "does not depend on 1 of the" in unused
    assert "cold" in cold
    _, info = solver.step(state, pieces)
    assert info.upper_loss is info.hypergradient_norm is info.upper_clipped is None
    assert info.notes == (unused,)


def test_upper_steps_are_due_at_the_end_of_each_window_after_the_start():
    case = build("mlp")
    solver = BilevelSolver(
        case.problem, SGD(0.1), SGD(0.1), OneStep(Jvp()), unroll_steps=3, upper_start=2
    )
    state = solver.init(case.params, case.upper_params)
    updated = []
    for step in range(9):
        wanted = solver.wants_upper(state)
        state, info = solver.step(state, [case.batch], case.upper_batch)
        assert wanted == (info.upper_loss is not None)
        if wanted:
            updated.append(step)
    assert updated == [4, 7]
    assert int(state.lower_steps) == 9
    assert int(state.upper_steps) == 2


@pytest.mark.parametrize("one_step", STEPS[:5], ids=str)
@pytest.mark.parametrize("unroll_steps", [1, 2])
def test_rollback_redoes_the_lower_step_with_the_new_upper_parameters(one_step, unroll_steps):
    case = build("dropout")
    make = {"unroll_steps": unroll_steps}
    rolling = BilevelSolver(case.problem, LOWER, SGD(5.0), one_step, rollback=True, **make)
    plain = BilevelSolver(case.problem, LOWER, SGD(5.0), one_step, **make)
    torch.manual_seed(5)
    state = rolling.init(case.params, case.upper_params)
    for _ in range(unroll_steps + 1):  # past the cold start, and at the end of a window
        state, _ = plain.step(state, [case.batch], None)
    while not rolling.wants_upper(state):
        state, _ = plain.step(state, [case.batch], None)
    random = torch.get_rng_state()
    ahead, _ = plain.step(state, [case.batch], case.upper_batch)
    torch.set_rng_state(random)
    moved = state._replace(upper_params=ahead.upper_params)
    redone, redone_info = plain.step(moved, [case.batch], None)
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    found, info = rolling.step(state, [case.batch], case.upper_batch)
    assert same_bits(found.upper_params, ahead.upper_params)
    assert same_bits(found.lower_params, redone.lower_params)
    assert not same_bits(found.lower_params, ahead.lower_params)
    assert torch.equal(info.weights, redone_info.weights)
    assert torch.equal(torch.get_rng_state(), after)
    assert info.upper_loss is not None


@pytest.mark.parametrize("one_step", [OneStep(direction_decay=0.9), *STEPS[:2]], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(one_step):
    case = build("dropout")
    solver = BilevelSolver(case.problem, LOWER, LazyRowAdam(0.05), one_step)
    case.upper_params.pop("scale")
    problem = replace(case.problem, weights=lambda upper, batch, _: upper["table"][batch["index"]])
    solver = replace(solver, problem=problem)
    whole, _ = trajectory(solver, case, [case.batch], case.upper_batch, steps=5)
    half, _ = trajectory(solver, case, [case.batch], case.upper_batch, steps=3)
    saved, random = tree.flatten(half), torch.get_rng_state()
    state = tree.unflatten(saved, solver.init(case.params, case.upper_params))
    torch.manual_seed(99)
    torch.set_rng_state(random)
    for _ in range(2):
        state, _ = solver.step(state, [case.batch], case.upper_batch)
    assert same_bits(state, whole)


def test_the_state_given_is_not_changed():
    case = build("mlp")
    solver = BilevelSolver(case.problem, LOWER, Adam(0.1), OneStep(Ghost(), "upper-first", 0.5))
    state, _ = solver.step(
        solver.init(case.params, case.upper_params), [case.batch], case.upper_batch
    )
    copy = tree.map(torch.clone, state)
    solver.step(state, [case.batch], case.upper_batch)
    assert same_bits(state, copy)
    assert not any(leaf.requires_grad for leaf in tree.leaves(state))


def test_steps_work_under_no_grad():
    case = build("mlp")
    solver = BilevelSolver(case.problem, LOWER, SGD(0.1))
    state = solver.init(case.params, case.upper_params)
    expected, _ = solver.step(state, [case.batch], case.upper_batch)
    with torch.no_grad():
        found, _ = solver.step(state, [case.batch], case.upper_batch)
    assert same_bits(found, expected)


def test_upper_parameters_without_influence_stay():
    case = build("mlp")
    problem = replace(case.problem, weights=lambda upper, batch, _: torch.ones(5).double())
    solver = BilevelSolver(problem, LOWER, AdamW(0.1, weight_decay=0.5))
    state, info = solver.step(
        solver.init(case.params, case.upper_params), [case.batch], case.upper_batch
    )
    assert torch.equal(state.upper_params["scale"], case.upper_params["scale"])
    assert not torch.equal(state.upper_params["table"], case.upper_params["table"])  # direct term
    assert info.hypergradient_norm > 0.0


@pytest.mark.parametrize(
    "method", [OneStep(), Unrolled(), Implicit(stationarity_tolerance=None)], ids=repr
)
def test_an_upper_parameter_without_influence_is_named(method):
    problem = ReweightingProblem(
        lambda lower, batch: ((batch @ lower["w"]) ** 2, None),
        lambda upper, batch, _: torch.sigmoid(upper["raw"]) + 0.0 * upper["bias"].detach(),
        lambda lower, upper, batch: (batch @ lower["w"]).sum(),
    )
    upper = {"bias": torch.zeros(()), "raw": torch.tensor([0.3, -0.2])}
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1), method)
    batch = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    state, info = solver.step(solver.init({"w": torch.ones(2)}, upper), [batch], batch)
    (note,) = [note for note in info.notes if "upper parameters" in note]
    assert "1 of the 2 upper parameters ('bias', ...)" in note
    assert torch.equal(state.upper_params["bias"], upper["bias"])
    assert not torch.equal(state.upper_params["raw"], upper["raw"])


@pytest.mark.parametrize("method", [OneStep(), Unrolled(), OneStep(Dot())], ids=repr)
def test_a_loss_that_is_not_finite_though_its_gradient_is_is_named(method):
    """The gradient is that of the other examples: the step is theirs."""

    def losses(lower, batch):
        values = batch @ lower["w"]
        return torch.where(batch[:, 0] > 0, values**2, torch.nan), None

    problem = ReweightingProblem(
        losses, lambda upper, batch, _: upper["raw"][: len(batch)], lambda t, *_: t["w"].sum()
    )
    single = method == OneStep(Dot())
    batches = [torch.tensor([[-1.0, 1.0], [0.5, -1.0]])]
    if single:
        batches = [batches[0][:1], batches[0][1:]]
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1), method, accumulation=len(batches))
    state = solver.init({"w": torch.ones(2)}, {"raw": torch.ones(2)})
    new, info = solver.step(state, batches, batches[0])
    assert info.lower_loss.isnan()
    assert [note for note in info.notes if note.startswith("the lower loss was not finite, but")]
    slope = 0.5 * 2 * (0.5 - 1.0) * torch.tensor([0.5, -1.0])  # mean over two, one without a part
    assert torch.allclose(new.lower_params["w"], 1.0 - 0.1 * slope)
    assert new.lower_skipped == 0


@pytest.mark.parametrize(
    "method", [OneStep(), Unrolled(), Implicit(stationarity_tolerance=None)], ids=repr
)
def test_a_loss_that_calls_backward_is_told_what_to_do(method):
    def lower_loss(lower, upper, batch):
        loss = (upper["scale"].exp() * batch @ lower["w"]).square().mean()
        loss.backward()
        return loss

    problem = BilevelProblem(lower_loss, lambda t, *_: t["w"].sum())
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1), method)
    state, batch = solver.init({"w": torch.ones(2)}, {"scale": torch.zeros(())}), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="a second time") as caught:
        solver.step(state, [batch], batch)
    (note,) = caught.value.__notes__
    assert "leave .backward() to the solver" in note


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unroll_steps": 0}, "unroll_steps must be at least 1, got 0"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"upper_start": -1}, "upper_start must be at least 0"),
    ],
)
def test_counts_are_checked(fields, message):
    case = build("mlp")
    with pytest.raises(ValueError, match=message):
        BilevelSolver(case.problem, LOWER, SGD(0.1), **fields)


def test_routes_are_checked_against_the_problem():
    case = build("mlp")
    attached = replace(case.problem, detach_features=False)
    scalar = BilevelProblem(case.problem.lower_loss, case.problem.upper_loss)
    for route in (Dot(), PerExample()):
        with pytest.raises(ValueError, match=r"needs a ReweightingProblem.*Auto\(\)"):
            BilevelSolver(scalar, LOWER, SGD(0.1), OneStep(route))
        with pytest.raises(ValueError, match=r"detach_features=False.*Auto\(\)"):
            BilevelSolver(attached, LOWER, SGD(0.1), OneStep(route))
    with pytest.raises(ValueError, match="upper gradient before the lower backward"):
        OneStep(Ghost(), "lower-first")
    with pytest.raises(ValueError, match="direction_decay must lie in"):
        OneStep(direction_decay=1.0)
    with pytest.raises(ValueError, match="order must be"):
        OneStep(order="sideways")


def test_batches_and_parameters_are_checked():
    case = build("mlp")
    solver = BilevelSolver(case.problem, LOWER, SGD(0.1))
    state = solver.init(case.params, case.upper_params)
    with pytest.raises(ValueError, match=r"expected accumulation=1 micro-batches, found 2"):
        solver.step(state, [case.batch, case.batch])
    with pytest.raises(ValueError, match=r"'step' is torch.int64"):
        solver.init({**case.params, "step": torch.zeros(1, dtype=torch.int64)}, {})
    with pytest.raises(ValueError, match=r"micro-batches of 1 example, found 5"):
        replace(solver, hypergradient=OneStep(Dot())).step(state, [case.batch])
    scalar = replace(
        case.problem, per_example_loss=lambda lower, batch: (lower["gain"].sum(), None)
    )
    with pytest.raises(ValueError, match=r"expected \(losses \[batch\], features\), found .*\(\)"):
        replace(solver, problem=scalar).step(state, [case.batch])
    wrong = replace(case.problem, weights=lambda upper, batch, _: upper["table"][:2])
    with pytest.raises(ValueError, match=r"one per loss, shape \(5,\), found \(2,\)"):
        replace(solver, problem=wrong).step(state, [case.batch])
    vector = replace(case.problem, upper_loss=lambda lower, upper, batch: upper["table"])
    with pytest.raises(ValueError, match=r"upper_loss: expected a scalar tensor, found \(5,\)"):
        replace(solver, problem=vector).step(state, [case.batch], case.upper_batch)
