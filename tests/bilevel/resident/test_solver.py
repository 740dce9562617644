"""What the resident solver takes over, consumes and refuses."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from bilevel import (
    SGD,
    AdamW,
    Auto,
    Dot,
    Ghost,
    Implicit,
    Jvp,
    LazyRowAdam,
    OneStep,
    Penalty,
    ResidentSolver,
    ReweightingProblem,
    Sama,
    Unrolled,
    check_hypergradient,
    fit,
    tree,
)
from tests.bilevel.comparing import same_bits
from tests.bilevel.variants import pick
from tests.bilevel.zoo import build


def scalar_problem():
    """ℓ_i = ½ (θ − x_i)², L_upper = ½ (θ − 1)²."""
    return ReweightingProblem(
        lambda theta, batch: (0.5 * (theta["w"] - batch["x"]) ** 2, None),
        lambda phi, batch, _: phi[batch["i"]],
        lambda theta, phi, batch: 0.5 * (theta["w"] - 1.0).square().sum(),
    )


def scalar_batch():
    return {"x": torch.tensor([3.0], dtype=torch.float64), "i": torch.tensor([0])}


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
def test_closed_form_of_a_step(order):
    """θ' = θ − lr w (θ − x); dL/dw = −lr (θ − x) (θ' − 1), upper-first (θ − 1) in its place."""
    theta, weight = torch.tensor([[0.5], [0.8]], dtype=torch.float64)
    solver = ResidentSolver(scalar_problem(), SGD(0.1), SGD(1.0), OneStep(Dot(), order))
    state = solver.init({"w": theta}, weight)
    state, infos = solver.advance(state, [[scalar_batch()]], {})
    moved = 0.5 - 0.1 * 0.8 * (0.5 - 3.0)
    at = moved if order == "lower-first" else 0.5
    assert abs(float(state.lower_params["w"]) - moved) < 1e-15
    assert abs(float(state.upper_params) - (0.8 + 0.1 * (0.5 - 3.0) * (at - 1.0))) < 1e-15
    assert abs(float(infos[-1].upper_loss) - 0.5 * (at - 1.0) ** 2) < 1e-15
    assert theta.data_ptr() == state.lower_params["w"].data_ptr()
    assert float(theta) == float(state.lower_params["w"])
    assert float(weight) == 0.8


@pytest.mark.parametrize("optimizer", [SGD(0.1), AdamW(0.1)], ids=["own rule", "fused kernel"])
def test_a_consumed_state_is_refused(optimizer):
    solver = ResidentSolver(scalar_problem(), optimizer, SGD(1.0), OneStep(Dot()))
    start = solver.init({"w": torch.zeros(1).double()}, torch.ones(1).double())
    state, _ = solver.advance(start, [[scalar_batch()]], {})
    for use in (
        lambda: solver.advance(start, [[scalar_batch()]]),
        lambda: solver.step(start, [scalar_batch()]),
        lambda: solver.next_steps(start),
        lambda: solver.advance(start._replace(upper_params=torch.ones(1)), [[scalar_batch()]]),
    ):
        with pytest.raises(ValueError, match="this state was consumed"):
            use()
    solver.advance(state, [[scalar_batch()]])


def test_a_call_that_fails_before_θ_moves_consumes_nothing():
    solver = ResidentSolver(scalar_problem(), SGD(0.1), SGD(1.0), OneStep(Dot()))
    state = solver.init({"w": torch.zeros(1).double()}, torch.ones(1).double())
    two = {"x": torch.zeros(2).double(), "i": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="micro-batches of 1 example, found 2"):
        solver.advance(state, [[two]], {})
    state, _ = solver.advance(state, [[scalar_batch()]], {})
    assert int(state.lower_steps) == 1


def test_a_call_that_fails_after_θ_has_moved_consumes_its_state():
    def upper_loss(theta, phi, batch):
        raise KeyError("no such meta row")

    problem = scalar_problem()
    problem = ReweightingProblem(problem.per_example_loss, problem.weights, upper_loss)
    solver = ResidentSolver(problem, SGD(0.1), SGD(1.0), OneStep(Dot()))
    state = solver.init({"w": torch.zeros(1).double()}, torch.ones(1).double())
    with pytest.raises(KeyError, match="no such meta row"):
        solver.advance(state, [[scalar_batch()]], {})
    with pytest.raises(ValueError, match="from a checkpoint"):
        solver.advance(state, [[scalar_batch()]])


def test_a_step_that_is_left_out_leaves_its_state_usable():
    solver = ResidentSolver(scalar_problem(), SGD(0.1), SGD(1.0), OneStep(Dot()))
    state = solver.init({"w": torch.zeros(1).double()}, torch.ones(1).double())
    bad = scalar_batch() | {"x": torch.tensor([float("nan")]).double()}
    after, infos = solver.advance(state, [[bad]], {})
    assert int(after.lower_skipped) == 1
    assert "not finite" in " ".join(infos[0].notes)
    assert float(after.lower_params["w"]) == 0.0
    solver.advance(state, [[scalar_batch()]])


def test_parameters_that_share_memory_are_refused():
    solver = ResidentSolver(scalar_problem(), SGD(0.1), SGD(1.0), OneStep(Dot()))
    one = torch.zeros(3)
    with pytest.raises(ValueError, match="'a' and 'b' share memory"):
        solver.init({"a": one, "b": one.view(3, 1)}, torch.ones(1))


def test_a_checkpoint_goes_on_as_if_nothing_had_been():
    case = build("mlp")
    batches = [[pick(case.batch, [row])] for row in range(5)]
    method = OneStep(Dot(), "upper-first", direction_decay=0.5)
    solver = ResidentSolver(case.problem, AdamW(0.02), SGD(0.5), method)

    def go_on(state, rows):
        for row in rows:
            state, _ = solver.advance(state, [batches[row]], case.upper_batch)
        return state

    state = go_on(solver.init(tree.map(torch.clone, case.params), case.upper_params), (0, 1))
    saved = {name: leaf.clone() for name, leaf in tree.flatten(state).items()}
    whole = go_on(state, (2, 3, 4))
    example = solver.init(tree.map(torch.clone, case.params), case.upper_params)
    resumed = go_on(tree.unflatten(saved, example), (2, 3, 4))
    assert same_bits(whole, resumed)


def test_the_loop_takes_it_as_any_solver():
    case = build("mlp")
    rows = [pick(case.batch, [row]) for row in range(5)]
    solver = ResidentSolver(case.problem, AdamW(0.02), SGD(0.5), OneStep(Dot()), unroll_steps=2)
    state = solver.init(tree.map(torch.clone, case.params), case.upper_params)
    found = fit(solver, state, itertools.cycle(rows), [case.upper_batch], steps=6)
    assert (int(found.lower_steps), int(found.upper_steps)) == (6, 3)


def test_the_audit_takes_it_and_leaves_its_state_alone():
    """``check_hypergradient`` runs the functional steps; the state stays usable."""
    case = build("mlp")
    solver = ResidentSolver(case.problem, SGD(0.1), SGD(0.5), OneStep(Dot()))
    state = solver.init(tree.map(torch.clone, case.params), case.upper_params)
    before = tree.map(torch.clone, state.lower_params)
    check = check_hypergradient(solver, state, [pick(case.batch, [1])], case.upper_batch)
    assert check, check.message
    assert same_bits(state.lower_params, before)
    solver.advance(state, [[pick(case.batch, [1])]], case.upper_batch)


REFUSED = [
    ({"rollback": True}, "rollback, which goes back to the θ before a step, cannot be done"),
    ({"hypergradient": Unrolled(), "unroll_steps": 2}, "Unrolled, which keeps θ of several steps"),
    ({"hypergradient": Implicit()}, "Implicit"),
    ({"hypergradient": Penalty(1.0)}, "Penalty"),
    (
        {"hypergradient": Unrolled(), "initial": lambda phi: {"w": phi}},
        "initial, from which φ moves θ by other ways than its loss, cannot be done in place",
    ),
    ({"hyperparameters": lambda phi: {"lr": phi.exp()}}, "hyperparameters, from which φ moves θ"),
    ({"hypergradient": OneStep(Auto())}, r"by the route Auto\(\) cannot be done .* choose Dot\(\)"),
    ({"hypergradient": OneStep(Jvp())}, r"by the route Jvp\(\) .* or order='upper-first'"),
    (
        {"collective": SimpleNamespace(ranks=2)},
        "lower-first over several ranks cannot be done in place",
    ),
    ({"accumulation": 2}, "lower-first with accumulation=2 cannot be done in place; choose order="),
    ({"hypergradient": OneStep(Dot(), direction_decay=0.5)}, "with direction_decay=0.5"),
    ({"hypergradient": OneStep(Dot(), update_derivative=Sama())}, r"Sama\(\) cannot be done"),
    ({"lower_optimizer": SGD(0.1, max_norm=1.0, differentiate_clip=True)}, "differentiate_clip"),
    ({"lower_optimizer": LazyRowAdam(0.1)}, "the step of LazyRowAdam cannot be done in place"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=[r[1][:25] for r in REFUSED])
def test_what_it_does_not_do_is_refused_by_name(options, sentence):
    arguments = {"lower_optimizer": SGD(0.1), "hypergradient": OneStep(Dot())} | options
    with pytest.raises(ValueError, match=f"ResidentSolver: .*{sentence}"):
        ResidentSolver(scalar_problem(), upper_optimizer=SGD(1.0), **arguments)


def test_weights_that_see_the_parameters_are_refused_lower_first():
    problem = scalar_problem()
    attached = ReweightingProblem(
        problem.per_example_loss, problem.weights, problem.upper_loss, detach_features=False
    )
    with pytest.raises(ValueError, match="weights that depend on θ"):
        ResidentSolver(attached, SGD(0.1), SGD(1.0), OneStep(Dot()))


def test_a_route_that_refuses_says_so_as_ever():
    case = build("mlp")
    solver = ResidentSolver(case.problem, SGD(0.1), SGD(1.0), OneStep(Ghost(), "upper-first"))
    state = solver.init(tree.map(torch.clone, case.params), case.upper_params)
    with pytest.raises(ValueError, match="expected accumulation=1"):
        solver.advance(state, [[case.batch, case.batch]], case.upper_batch)
