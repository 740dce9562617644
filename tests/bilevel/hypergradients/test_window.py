"""Windows of lower steps: the protocol, roll-back, guards, auxiliary outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from bilevel import (
    SGD,
    Adam,
    AdamW,
    Auto,
    BilevelProblem,
    BilevelSolver,
    Dot,
    Ghost,
    HypergradientResult,
    Jvp,
    LazyRowAdam,
    OneStep,
    PassRequest,
    PerExample,
    Reverse,
    Unrolled,
    WarmupCosine,
    Window,
    tree,
)
from tests.bilevel.comparing import relative, same_bits
from tests.bilevel.variants import pick
from tests.bilevel.zoo import build

LOWER = AdamW(WarmupCosine(0.05, 1, 20), weight_decay=0.1, max_norm=0.5)
METHODS = [
    OneStep(Auto()),
    OneStep(Ghost(), "upper-first"),
    OneStep(PerExample(), direction_decay=0.5),
    Unrolled(),
    Unrolled(steps=2, replay=1),
]


def make_solver(case, method, **options):
    options = {"unroll_steps": 3, **options}
    return BilevelSolver(case.problem, LOWER, SGD(5.0), method, **options)


def batches_of(case, steps=3):
    """Other examples in every step."""
    rows = [[0, 1, 2, 3, 4], [4, 2, 0], [1, 3]]
    return [[pick(case.batch, rows[step % 3])] for step in range(steps)]


@pytest.mark.parametrize("method", METHODS[:3], ids=str)
def test_a_window_is_its_steps(method):
    """For hypergradients through the last step: one call or three, the same bits."""
    case = build("dropout")
    solver = make_solver(case, method)
    batches = batches_of(case)
    torch.manual_seed(5)
    stepped, infos = solver.init(case.params, case.upper_params), []
    for _ in range(2):
        for micro_batches in batches:
            stepped, info = solver.step(stepped, micro_batches, case.upper_batch)
            infos.append(info)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    state, found = solver.init(case.params, case.upper_params), ()
    for _ in range(2):
        assert solver.starts_window(state)
        state, more = solver.window(state, batches, case.upper_batch)
        found += more
    assert same_bits(state, stepped)
    assert torch.equal(torch.get_rng_state(), after)
    for one, other in zip(found, infos, strict=True):
        assert one.lower_loss == other.lower_loss
        assert one.lower_grad_norm == other.lower_grad_norm
        assert torch.equal(one.weights, other.weights)
        assert torch.equal(one.losses, other.losses)
        assert (one.upper_loss is None) == (other.upper_loss is None)
        assert one.notes == other.notes


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_without_an_upper_step_a_window_is_plain_training(method):
    """Bit for bit, with the random numbers left where plain training leaves them."""
    case = build("dropout")
    frozen = replace(make_solver(case, method), upper_optimizer=SGD(0.0))
    batches = batches_of(case)
    torch.manual_seed(5)
    state = frozen.init(case.params, case.upper_params)
    with_upper, infos = frozen.window(state, batches, case.upper_batch)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    without, plain_infos = frozen.window(state, batches)
    assert infos[-1].hypergradient_norm > 0.0
    assert torch.equal(torch.get_rng_state(), after)
    assert same_bits(with_upper.lower_params, without.lower_params)
    assert same_bits(with_upper.lower_optimizer, without.lower_optimizer)
    assert same_bits(without.memory, state.memory)
    for one, other in zip(infos, plain_infos, strict=True):
        assert torch.equal(one.losses, other.losses)
        assert one.lower_grad_norm == other.lower_grad_norm
        assert other.upper_loss is None


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_rollback_redoes_the_window_with_the_new_upper_parameters(method):
    case = build("dropout")
    batches = batches_of(case)
    plain = make_solver(case, method)
    rolling = replace(plain, rollback=True)
    torch.manual_seed(5)
    state, _ = plain.window(plain.init(case.params, case.upper_params), batches)
    random = torch.get_rng_state()
    ahead, ahead_infos = plain.window(state, batches, case.upper_batch)
    torch.set_rng_state(random)
    redone, redone_infos = plain.window(
        state._replace(upper_params=ahead.upper_params), batches, None
    )
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    found, infos = rolling.window(state, batches, case.upper_batch)
    assert same_bits(found.upper_params, ahead.upper_params)
    assert same_bits(found.lower_params, redone.lower_params)
    assert same_bits(found.lower_optimizer, redone.lower_optimizer)
    assert not same_bits(found.lower_params, ahead.lower_params)
    assert same_bits(found.memory, ahead.memory)
    assert torch.equal(torch.get_rng_state(), after)
    assert [info.lower_loss for info in infos] == [info.lower_loss for info in redone_infos]
    assert infos[-1].upper_loss == ahead_infos[-1].upper_loss


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_resumed_run_of_windows_is_the_uninterrupted_one(method):
    case = build("dropout")
    problem = replace(case.problem, weights=lambda upper, batch, _: upper["table"][batch["index"]])
    case = replace(
        case, problem=problem, upper_params={"table": case.upper_params["table"].abs() + 0.1}
    )
    solver = replace(make_solver(case, method), upper_optimizer=LazyRowAdam(0.05))
    batches = batches_of(case)

    def run(state, windows):
        for _ in range(windows):
            state, _ = solver.window(state, batches, case.upper_batch)
        return state

    torch.manual_seed(5)
    whole = run(solver.init(case.params, case.upper_params), 3)
    torch.manual_seed(5)
    half = run(solver.init(case.params, case.upper_params), 2)
    saved, random = tree.flatten(half), torch.get_rng_state()
    torch.manual_seed(99)
    torch.set_rng_state(random)
    state = tree.unflatten(saved, solver.init(case.params, case.upper_params))
    assert same_bits(run(state, 1), whole)
    assert int(whole.lower_steps) == 9
    assert int(whole.upper_steps) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("rollback", [False, True])
def test_a_hypergradient_that_is_not_finite_never_reaches_the_upper_parameters(
    method, value, rollback
):
    case = build("mlp")
    bad = replace(
        case.problem,
        upper_loss=lambda lower, upper, batch: (lower["gain"] * value).sum() + upper["table"].sum(),
    )
    solver = replace(make_solver(case, method), upper_optimizer=Adam(0.1), rollback=rollback)
    batches = batches_of(case)
    state, _ = solver.window(solver.init(case.params, case.upper_params), batches, case.upper_batch)
    broken, infos = replace(solver, problem=bad).window(state, batches, case.upper_batch)
    plain, _ = solver.window(state, batches)
    assert same_bits(broken.upper_params, state.upper_params)
    assert same_bits(broken.upper_optimizer, state.upper_optimizer)
    assert same_bits(broken.memory, state.memory)
    assert same_bits(broken.lower_params, plain.lower_params)
    assert int(broken.upper_steps) == 1
    assert int(broken.upper_skipped) == 1
    assert not math.isfinite(infos[-1].hypergradient_norm)
    assert any("not finite" in note for note in infos[-1].notes)
    again, infos = solver.window(broken, batches, case.upper_batch)
    assert int(again.upper_steps) == 2
    assert int(again.upper_skipped) == 1
    assert tree.allfinite(again.upper_params)
    assert infos[-1].hypergradient_norm > 0.0


def test_windows_start_after_upper_start():
    case = build("mlp")
    solver = make_solver(case, Unrolled(), upper_start=2)
    batches = batches_of(case)
    state = solver.init(case.params, case.upper_params)
    starts = []
    while int(state.lower_steps) < 8:
        starts.append(solver.starts_window(state))
        if starts[-1]:
            state, infos = solver.window(state, batches, case.upper_batch)
            assert infos[-1].upper_loss is not None
        else:
            state, info = solver.step(state, batches[0])
            assert info.upper_loss is None
    assert starts == [False, False, True, True]
    assert int(state.upper_steps) == 2
    early, infos = solver.window(
        solver.init(case.params, case.upper_params), batches, case.upper_batch
    )
    assert int(early.upper_steps) == 0
    assert all(info.upper_loss is None for info in infos)


@pytest.mark.parametrize("method", [OneStep(Jvp()), Unrolled(), Unrolled(1)], ids=str)
@pytest.mark.parametrize("unroll_steps", [1, 3])
def test_what_comes_next(method, unroll_steps):
    """Windows where steps belong together, else single steps, the last of a window with an upper
    step; a rest that is shorter than a window has none."""
    case = build("mlp")
    solver = make_solver(case, method, unroll_steps=unroll_steps, upper_start=2)
    batches = batches_of(case)
    state, taken = solver.init(case.params, case.upper_params), []
    while int(state.lower_steps) < 7:
        due = solver.next_steps(state, 7 - int(state.lower_steps))
        upper_steps = int(state.upper_steps)
        state, infos = solver.advance(
            state, batches[: due.lower], case.upper_batch if due.upper else None
        )
        taken.append(tuple(due))
        assert len(infos) == due.lower
        assert int(state.upper_steps) - upper_steps == int(due.upper)
    plain, last = (1, False), (1, True)
    if unroll_steps == 1:
        assert taken == [plain] * 2 + [last] * 5
    elif isinstance(method, OneStep):
        assert taken == [plain] * 4 + [last, plain, plain]
    else:
        assert taken == [plain] * 2 + [(3, True)] + [plain] * 2
        assert solver.next_steps(state._replace(lower_steps=torch.tensor(5))) == (3, True)


def test_wrong_use_is_refused():
    case = build("mlp")
    solver = make_solver(case, Unrolled())
    state, batches = solver.init(case.params, case.upper_params), batches_of(case)
    with pytest.raises(ValueError, match=r"goes through all unroll_steps=3.*window\(state"):
        solver.step(state, batches[0], case.upper_batch)
    solver.step(state, batches[0])  # a plain step is fine
    with pytest.raises(ValueError, match=r"unroll_steps=3 lower steps, found 2"):
        solver.window(state, batches[:2], case.upper_batch)
    with pytest.raises(ValueError, match=r"unroll_steps=3 lower steps, found 0"):
        solver.window(state, [])
    assert len(solver.window(state, batches[:2])[1]) == 2
    with pytest.raises(ValueError, match=r"expected accumulation=1 micro-batches, found 2"):
        solver.window(state, [batches[0] * 2] * 3, case.upper_batch)
    single = make_solver(case, Unrolled(), unroll_steps=1)
    assert single.step(state, batches[0], case.upper_batch)[1].upper_loss is not None


def test_unrolled_is_checked():
    case = build("mlp")
    with pytest.raises(ValueError, match=r"steps=4 do not fit a window of unroll_steps=3.*None"):
        make_solver(case, Unrolled(steps=4))
    with pytest.raises(ValueError, match=r"LazyRowAdam has no vjp"):
        BilevelSolver(case.problem, LazyRowAdam(0.1), SGD(0.1), Unrolled())
    for wrong, message in (
        ({"steps": 0}, "steps"),
        ({"replay": 0}, "replay"),
        ({"replay": "log"}, "replay must be None, an int or 'sqrt', got 'log'"),
        ({"store": "disk"}, "store must be 'device' or 'host', got 'disk'"),
        ({"product": Dot()}, r"product must be Auto\(\), Jvp\(\), Reverse\(\) or Central"),
    ):
        with pytest.raises(ValueError, match=message):
            Unrolled(**wrong)


def test_a_users_own_hypergradient():
    """Anything with check, init and record will do; its memory is part of the state."""

    @dataclass(frozen=True)
    class Random:
        scale: float

        def check(self, problem, optimizer, unroll_steps):
            if unroll_steps != 3:
                raise ValueError("wants windows of 3")

        def init(self, optimizer, lower_params, upper_params):
            return {"calls": torch.zeros((), dtype=torch.int64)}

        def record(self, window, upper_batch, memory):
            return RandomRecord(self.scale, window, memory, [])

    @dataclass(frozen=True)
    class RandomRecord:
        scale: float
        window: Window
        memory: dict
        points: list

        def before(self, number, point, random):
            self.points.append(point)
            return PassRequest()

        def after(self, step):
            assert step.number == len(self.points) - 1
            assert step.before is self.points[-1]
            assert step.passed.grads is not None

        def hypergradient(self, end):
            assert len(self.points) == 3
            assert same_bits(self.points[0].lower_params, case.params)
            return HypergradientResult(
                torch.zeros(()),
                tree.map(lambda leaf: torch.full_like(leaf, self.scale), self.window.upper_params),
                {"calls": self.memory["calls"] + 1},
                {"residual": torch.ones(())},
                ("made up",),
            )

    case = build("mlp")
    with pytest.raises(ValueError, match="wants windows of 3"):
        make_solver(case, Random(0.1), unroll_steps=2)
    solver = make_solver(case, Random(0.1))
    state, infos = solver.window(
        solver.init(case.params, case.upper_params), batches_of(case), case.upper_batch
    )
    assert int(state.memory["calls"]) == 1
    plain, _ = solver.window(solver.init(case.params, case.upper_params), batches_of(case))
    assert same_bits(state.lower_params, plain.lower_params)
    assert infos[-1].notes[-1] == "made up"
    assert infos[-1].figures == {"residual": 1.0}
    assert infos[0].figures == {}
    expected = tree.map(lambda leaf: leaf - 5.0 * 0.1, case.upper_params)
    assert relative(state.upper_params, expected) <= 1e-15


def auxiliary_problem():
    """A linear model whose losses also return what they computed on the way."""

    def lower_loss(lower, upper, batch):
        errors = batch["x"] @ lower["w"] - batch["y"]
        ridge = upper["ridge"] * lower["w"].square().sum()
        return errors.square().mean() + ridge, {"errors": errors, "rows": len(errors)}

    def upper_loss(lower, upper, batch):
        errors = batch["x"] @ lower["w"] - batch["y"]
        return errors.square().mean(), errors

    return BilevelProblem(lower_loss, upper_loss, batch_size=lambda batch: len(batch["y"]))


@pytest.mark.parametrize(
    "method",
    [OneStep(), OneStep(Reverse(), "upper-first"), Unrolled(), Unrolled(product=Jvp())],
    ids=str,
)
def test_auxiliary_outputs_reach_the_info_detached_and_change_nothing(method):
    problem, plain = auxiliary_problem(), auxiliary_problem()
    plain = BilevelProblem(
        lambda *a: problem.lower_loss(*a)[0], lambda *a: problem.upper_loss(*a)[0], plain.batch_size
    )
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    pieces = [{"x": x[:3], "y": y[:3]}, {"x": x[3:], "y": y[3:]}]
    params = {"w": torch.randn(3, dtype=torch.float64)}
    upper = {"ridge": torch.tensor(0.1, dtype=torch.float64)}
    states = []
    for one in (problem, plain):
        solver = BilevelSolver(one, SGD(0.1, 0.9), SGD(0.1), method, 2, accumulation=2)
        state = solver.init(params, upper)
        state, infos = solver.window(state, [pieces] * 2, pieces[0])
        states.append(state)
        if one is problem:
            assert len(infos[0].lower_aux) == 2
            first = infos[0].lower_aux[1]
            assert torch.equal(first["errors"], x[3:] @ params["w"] - y[3:])
            assert first["rows"] == 2
            assert not first["errors"].requires_grad
            assert infos[0].upper_aux is None
            if method != OneStep(Reverse(), "upper-first"):
                at = state.lower_params["w"]
                assert torch.equal(infos[1].upper_aux, x[:3] @ at - y[:3])
            assert not infos[1].upper_aux.requires_grad
        else:
            assert infos[1].lower_aux == (None, None)
    assert same_bits(*states)
    wrong = replace(problem, lower_loss=lambda lower, upper, batch: (lower["w"], None))
    with pytest.raises(ValueError, match=r"lower_loss: expected a scalar tensor, found \(3,\)"):
        replace(solver, problem=wrong).window(state, [pieces] * 2, pieces[0])


@pytest.mark.parametrize("method", [OneStep(), Unrolled(), Unrolled(product=Jvp())], ids=str)
def test_the_users_module_is_never_mutated(method):
    """Parameters, buffers, gradients and modes are after a window what they were before."""
    module = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1)
    ).double()
    module[1].eval()

    def lower_loss(lower, upper, batch):
        out = torch.func.functional_call(module, lower, (batch,))
        return (torch.sigmoid(upper) * out.squeeze(1).square()).mean()

    problem = BilevelProblem(
        lower_loss, lambda lower, upper, batch: lower_loss(lower, upper, batch)
    )
    solver = BilevelSolver(problem, Adam(0.1, eps=1e-3), SGD(1.0), method, 3)
    params = dict(module.named_parameters())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(5, 4, dtype=torch.float64)
    state = solver.init(params, torch.zeros(5, dtype=torch.float64))
    state, infos = solver.window(state, [[x]] * 3, x)
    state, infos = solver.window(state, [[x]] * 3, x)
    assert infos[-1].hypergradient_norm > 0.0
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    assert all(leaf.grad is None and leaf.requires_grad for leaf in module.parameters())
    assert [part.training for part in module] == [True, False, True, True]
    assert not any(leaf.requires_grad for leaf in tree.leaves(state))
