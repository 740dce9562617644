"""What is not finite is no step, and what has no effect is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bilevel import (
    SGD,
    Adam,
    BilevelProblem,
    BilevelSolver,
    ConjugateGradient,
    Dot,
    Ghost,
    Implicit,
    Jvp,
    OneStep,
    Penalty,
    PerExample,
    Reverse,
    ReweightingProblem,
    Unrolled,
    check_hypergradient,
    compare_hypergradients,
    functional,
)
from tests.bilevel.comparing import same_bits

DOUBLE = torch.float64
METHODS = [OneStep(), OneStep(Jvp()), OneStep(Ghost(), order="upper-first"), OneStep(Reverse())]
METHODS += [Unrolled(), Penalty(1.0), Implicit(stationarity_tolerance=None)]


def regression(weights=None, upper=None):
    """Weighted squares of three examples; the target may be anything."""

    def losses(t, b):
        return (b["x"] @ t["w"] - b["y"]) ** 2, None

    return ReweightingProblem(
        losses,
        weights or (lambda p, b, _: p["r"][b["i"]]),
        upper or (lambda t, p, b: losses(t, b)[0].mean()),
    )


def batch_of(*targets):
    torch.manual_seed(0)
    y = torch.tensor(targets, dtype=DOUBLE)
    return {"x": torch.randn(len(y), 2, dtype=DOUBLE), "y": y, "i": torch.arange(len(y))}


def start(solver, weights=(1.0, 0.5, 2.0)):
    params = {"w": torch.ones(2, dtype=DOUBLE)}
    return solver.init(params, {"r": torch.tensor(weights, dtype=DOUBLE)})


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_lower_gradient_that_is_not_finite_is_no_step(method, bad):
    solver = BilevelSolver(regression(), Adam(0.1), Adam(0.1), method)
    good = batch_of(1.0, -1.0, 2.0)
    before, _ = solver.window(start(solver), [[good]], good)
    after, (info,) = solver.window(before, [[batch_of(1.0, bad, 2.0)]], good)
    for field in ("lower_params", "lower_optimizer", "upper_params", "upper_optimizer", "memory"):
        assert same_bits(getattr(after, field), getattr(before, field)), field
    assert (int(after.lower_steps), int(after.lower_skipped), int(after.upper_skipped)) == (2, 1, 1)
    assert any("lower gradient was not finite" in note for note in info.notes)
    assert any("no upper step" in note for note in info.notes)
    assert not torch.isfinite(info.lower_grad_norm)
    again, _ = solver.window(after, [[good]], good)
    expected, _ = solver.window(before, [[good]], good)
    assert same_bits(again.lower_params, expected.lower_params)
    assert same_bits(again.upper_params, expected.upper_params)


def test_a_window_goes_on_after_a_step_that_was_left_out():
    solver = BilevelSolver(regression(), SGD(0.1), SGD(0.1), Unrolled(), unroll_steps=3)
    good, bad = batch_of(1.0, -1.0, 2.0), batch_of(float("nan"), 0.0, 0.0)
    state, infos = solver.window(start(solver), [[good], [bad], [good]], good)
    plain, _ = solver.advance(start(solver), [[good], [good]])
    assert same_bits(state.lower_params, plain.lower_params)
    assert same_bits(state.upper_params, plain.upper_params)
    assert [len(info.notes) for info in infos] == [0, 1, 1]
    assert (int(state.lower_skipped), int(state.upper_steps), int(state.upper_skipped)) == (1, 0, 1)


@pytest.mark.parametrize(
    "method", [OneStep(), OneStep(PerExample()), OneStep(Ghost(), order="upper-first")], ids=str
)
def test_a_nan_example_of_weight_0_has_no_part_in_the_step(method):
    """The step is that of the others, and so is the hypergradient in their weights."""
    solver = BilevelSolver(regression(), SGD(0.1), SGD(0.1), method)
    good = batch_of(1.0, -1.0, 2.0)
    for bad in (float("nan"), float("inf")):
        with_bad = {**good, "y": torch.tensor([1.0, bad, 2.0], dtype=DOUBLE)}
        weights = (1.0, 0.0, 2.0)
        after, info = solver.step(start(solver, weights), [with_bad], good)
        expected, other = solver.step(start(solver, weights), [good], good)
        assert same_bits(after.lower_params, expected.lower_params)
        assert torch.equal(info.lower_loss, other.lower_loss)
        found, right = after.upper_params["r"], expected.upper_params["r"]
        assert same_bits(found[[0, 2]], right[[0, 2]])
        assert float(found[1]) == 0.0
        assert int(after.lower_skipped) == int(after.upper_skipped) == 0


def test_so_it_is_for_single_examples():
    solver = BilevelSolver(regression(), SGD(0.1), SGD(0.1), OneStep(Dot()), accumulation=2)
    good, bad = batch_of(1.0), {**batch_of(float("nan")), "i": torch.ones(1, dtype=torch.int64)}
    after, _ = solver.step(start(solver, (1.0, 0.0)), [good, bad], good)
    slope = 2 * good["x"][0] * (good["x"][0].sum() - 1.0) / 2
    torch.testing.assert_close(after.lower_params["w"], 1.0 - 0.1 * slope)
    assert int(after.lower_skipped) == int(after.upper_skipped) == 0


@pytest.mark.parametrize("method", [OneStep(Jvp()), OneStep(Reverse()), Unrolled()], ids=str)
def test_where_its_nan_cannot_be_left_out_the_step_is(method):
    solver = BilevelSolver(regression(), SGD(0.1), SGD(0.1), method)
    good = batch_of(1.0, -1.0, 2.0)
    before = start(solver, (1.0, 0.0, 2.0))
    after, _ = solver.step(before, [batch_of(1.0, float("nan"), 2.0)], good)
    assert same_bits(after.lower_params, before.lower_params)
    assert int(after.lower_skipped) == 1


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_upper_loss_of_an_empty_batch_is_no_step(method):
    """Its mean is NaN, its gradient 0."""
    solver = BilevelSolver(regression(), SGD(0.1), Adam(0.1), method)
    good = batch_of(1.0, -1.0, 2.0)
    empty = {name: leaf[:0] for name, leaf in good.items()}
    before = start(solver)
    after, (info,) = solver.window(before, [[good]], empty)
    assert same_bits(after.upper_params, before.upper_params)
    assert (int(after.upper_steps), int(after.upper_skipped), int(after.lower_skipped)) == (0, 1, 0)
    assert any("not finite" in note for note in info.notes)
    assert not same_bits(after.lower_params, before.lower_params)


def notes_of(problem, method=OneStep(), upper_params=None):  # noqa: B008
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1), method)
    good = batch_of(1.0, -1.0, 2.0)
    state = (
        start(solver)
        if upper_params is None
        else solver.init({"w": torch.ones(2, dtype=DOUBLE)}, upper_params)
    )
    after, (info,) = solver.window(state, [[good]], good)
    return " | ".join(info.notes), after, state


ALL = [OneStep(), OneStep(Jvp()), OneStep(Reverse()), Unrolled()]


@pytest.mark.parametrize("method", ALL, ids=str)
def test_a_loss_that_uses_the_module_in_place_of_its_parameters_is_noted(method):
    net = nn.Linear(2, 1, bias=False, dtype=DOUBLE)

    def losses(t, b):
        return (net(b["x"]).squeeze(1) - b["y"]) ** 2, None

    problem = ReweightingProblem(losses, lambda p, b, _: p["r"][b["i"]], regression().upper_loss)
    notes, after, before = notes_of(problem, method)
    assert "the lower loss does not depend on the lower parameters" in notes
    assert "bilevel.functional" in notes
    assert same_bits(after.lower_params, before.lower_params)


@pytest.mark.parametrize("method", [OneStep(), OneStep(Reverse()), Unrolled()], ids=str)
@pytest.mark.parametrize("way", ["unused", "reentrant"])
def test_a_loss_that_uses_a_part_of_the_parameters_is_noted(method, way):
    """Reentrant checkpointing runs a part under no_grad, which counts where its input has none."""

    def losses(t, b):
        def hidden(x):
            return torch.tanh(x @ t["u"])

        if way == "reentrant":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
                x = checkpoint(hidden, b["x"], use_reentrant=True)
        else:
            x = b["x"]
        return (x @ t["w"] - b["y"]) ** 2, None

    plain = regression()
    theta = {"u": torch.eye(2, dtype=DOUBLE), "w": torch.ones(2, dtype=DOUBLE)}
    problem = ReweightingProblem(losses, lambda p, b, _: p["r"][b["i"]], plain.upper_loss)
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1), method)
    good, weights = batch_of(1.0, -1.0, 2.0), {"r": torch.ones(3, dtype=DOUBLE)}
    state, (info,) = solver.window(solver.init(theta, weights), [[good]], good)
    (note,) = info.notes
    assert "the lower loss does not depend on 1 of the 2 lower parameters ('u', ...)" in note
    assert torch.equal(state.lower_params["u"], theta["u"])


@pytest.mark.parametrize("method", ALL, ids=str)
@pytest.mark.parametrize("direct", [False, True])
def test_weights_without_a_graph_are_noted(method, direct):
    """Whether or not the upper parameters have an influence past the weights."""

    @torch.no_grad()
    def weights(p, b, _):
        return p["r"][b["i"]]

    def upper(t, p, b):
        loss = (b["x"] @ t["w"]).square().mean()
        return loss + p["r"].square().sum() if direct else loss

    notes, after, before = notes_of(regression(weights, upper), method)
    assert "the weights do not depend on the upper parameters" in notes
    assert same_bits(after.upper_params, before.upper_params) != direct


@pytest.mark.parametrize(
    "method", [*ALL, Implicit(stationarity_tolerance=None), Penalty(1.0)], ids=str
)
@pytest.mark.parametrize("direct", [False, True])
def test_an_upper_loss_that_ignores_the_lower_parameters_is_noted(method, direct):
    def upper(t, p, b):
        return p["r"].square().sum() if direct else torch.ones((), dtype=DOUBLE)

    notes, _, _ = notes_of(regression(upper=upper), method)
    assert notes.count("the upper loss does not depend on the lower parameters") == 1
    if not isinstance(method, Penalty):  # whose copy takes steps of its own
        assert ("exactly 0" in notes or "no influence" in notes) != direct


@pytest.mark.parametrize("method", ALL, ids=str)
def test_a_lower_loss_that_ignores_the_upper_parameters_is_noted(method):
    plain = regression()
    problem = BilevelProblem(lambda t, p, b: plain.losses(t, b)[0].mean(), plain.upper_loss)
    notes, _, _ = notes_of(problem, method)
    assert "exactly 0" in notes or "have no influence on the upper loss" in notes


def test_what_has_an_effect_is_not_noted():
    for method in ALL:
        assert notes_of(regression(), method)[0] == ""
    assert notes_of(regression(lambda p, b, _: torch.ones(3, dtype=DOUBLE)), OneStep(), {})[0] == ""


def test_an_implicit_system_without_any_solution_is_no_step():
    """The Hessian is −1: conjugate gradients stop before their first step, at q = 0."""
    problem = BilevelProblem(
        lambda t, p, b: -0.5 * (t["w"] - p["r"]).square().sum(), lambda t, p, b: t["w"].sum()
    )
    method = Implicit(ConjugateGradient(), stationarity_tolerance=None)
    notes, after, before = notes_of(problem, method, {"r": torch.zeros(2, dtype=DOUBLE)})
    assert "not positive definite" in notes
    assert same_bits(after.upper_params, before.upper_params)
    assert (int(after.upper_steps), int(after.upper_skipped)) == (0, 1)


def test_an_audit_where_nothing_is_finite_says_so():
    solver = BilevelSolver(regression(), SGD(0.1), SGD(0.1))
    good, bad = batch_of(1.0, -1.0, 2.0), batch_of(1.0, float("nan"), 2.0)
    with pytest.raises(ValueError, match="a lower gradient is not finite at this state"):
        check_hypergradient(solver, start(solver), [bad], good)
    methods = {"a": OneStep(), "b": OneStep(Jvp())}
    with pytest.raises(ValueError, match="a lower gradient is not finite at this state"):
        compare_hypergradients(solver, [(start(solver), [[bad]], good)], methods)


def test_several_processes_are_refused(monkeypatch):
    solver = BilevelSolver(regression(), SGD(0.1), SGD(0.1))
    state, good = start(solver), batch_of(1.0, -1.0, 2.0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    solver.step(state, [good], good)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for call in (lambda: start(solver), lambda: solver.step(state, [good], good)):
        with pytest.raises(RuntimeError, match=r"runs 2 processes.*run one process"):
            call()


def test_wrappers_of_several_processes_are_refused(tmp_path):
    net = nn.DataParallel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"wrapped by DataParallel.*\(\.module\)"):
        functional(net)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

        with pytest.raises(ValueError, match="wrapped by DistributedDataParallel"):
            functional(nn.Sequential(nn.parallel.DistributedDataParallel(nn.Linear(2, 2))))
        mesh = init_device_mesh("cpu", (1,))
        sharded = nn.Sequential(fully_shard(nn.Linear(2, 2), mesh=mesh))
        with pytest.raises(ValueError, match="0 is sharded by fully_shard, which computes with"):
            functional(sharded)
        spread = DTensor.from_local(torch.ones(2, dtype=DOUBLE), mesh, [Replicate()])
        solver = BilevelSolver(regression(), SGD(0.1), SGD(0.1))
        with pytest.raises(ValueError, match="a parameter is a DTensor"):
            solver.init({"w": spread}, {})
    finally:
        torch.distributed.destroy_process_group()
