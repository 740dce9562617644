"""An upper gradient that serves several upper steps: ``OneStep(upper_gradient_every=N)``."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bilevel import (
    SGD,
    AdamW,
    Auto,
    BilevelSolver,
    CentralDifference,
    Dot,
    Ghost,
    Jvp,
    OneStep,
    PerExample,
    ResidentSolver,
    Reverse,
    check_hypergradient,
    fit,
    tree,
)
from bilevel.solver import UNREAD
from tests.bilevel.comparing import relative, same_bits
from tests.bilevel.resident.both import assert_same_run, both, run
from tests.bilevel.variants import cast, pick
from tests.bilevel.zoo import build, table_weights

STEPS = 7


def indirect(case):
    """The case without the term of its upper loss that depends on φ alone."""

    def upper_loss(lower, upper, batch):
        return case.problem.upper_loss(lower, tree.map(torch.Tensor.detach, upper), batch)

    return replace(case, problem=replace(case.problem, upper_loss=upper_loss))


def held(every, route=None, **options):
    return OneStep(route or Auto(), "upper-first", upper_gradient_every=every, **options)


def windows_of(case):
    """Single examples, a step each."""
    return [[pick(case.batch, [row])] for row in range(5)]


def by_hand(case, batches, every, decay, lr, upper_lr):
    """θ, φ and the number of upper gradients after steps of SGD written out."""
    theta, phi = case.params, case.upper_params
    average, gradients = tree.zeros_like(theta), 0
    for step, batch in enumerate(batches):
        if step % every == 0:
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in theta.items()}
            loss = case.problem.upper_loss(leaves, phi, case.upper_batch)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for (name, old), new in zip(list(average.items()), found, strict=True):
                new = torch.zeros_like(old) if new is None else new
                average[name] = decay * old + (1.0 - decay) * new
            gradients += 1
            v = {name: leaf / (1.0 - decay**gradients) for name, leaf in average.items()}
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in theta.items()}
        moving = {name: leaf.clone().requires_grad_() for name, leaf in phi.items()}
        losses, _ = case.problem.per_example_loss(leaves, batch)
        loss = (table_weights(moving, batch, None) * losses).mean()
        grads = torch.autograd.grad(
            loss, list(leaves.values()), create_graph=True, allow_unused=True
        )
        grads = dict(zip(leaves, grads, strict=True))
        moved = {
            name: leaf if grads[name] is None else leaf - lr * grads[name]
            for name, leaf in theta.items()
        }
        slope = sum((v[name] * leaf).sum() for name, leaf in moved.items())
        downhill = torch.autograd.grad(slope, list(moving.values()))
        theta = tree.map(torch.Tensor.detach, moved)
        phi = {
            name: leaf - upper_lr * gradient
            for (name, leaf), gradient in zip(phi.items(), downhill, strict=True)
        }
    return theta, phi, gradients


@pytest.mark.parametrize("kind", [BilevelSolver, ResidentSolver])
@pytest.mark.parametrize("decay", [0.0, 0.6])
@pytest.mark.parametrize("every", [2, 3])
def test_it_is_what_is_written_out_by_hand(every, decay, kind):
    case = indirect(build("mlp"))
    windows = windows_of(case)
    method = held(every, Dot(), direction_decay=decay)
    found = run(kind(case.problem, SGD(0.2), SGD(0.7), method), case, windows, STEPS).state
    batches = [windows[step % 5][0] for step in range(STEPS)]
    theta, phi, gradients = by_hand(case, batches, every, decay, 0.2, 0.7)
    assert relative(found.lower_params, theta) <= 1e-13
    assert relative(found.upper_params, phi) <= 1e-13
    assert int(found.memory.held.updates) == gradients == math.ceil(STEPS / every)
    fresh, _, _ = by_hand(case, batches, 1, decay, 0.2, 0.7)
    assert relative(found.lower_params, fresh) > 1e-6  # or the test would not see a stale v


ROUTES = [Auto(), Dot(), Ghost(), PerExample(), Jvp(), Reverse(), CentralDifference()]


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_with_a_linear_upper_loss_an_earlier_gradient_is_the_present_one(route):
    """By every route, through the derivative of AdamW's present state."""
    case = build("attention")
    generator = torch.Generator().manual_seed(3)
    along = tree.map(
        lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype), case.params
    )
    linear = replace(case.problem, upper_loss=lambda theta, phi, batch: tree.vdot(along, theta))
    case = replace(case, problem=linear)
    windows = windows_of(case)
    optimizer = AdamW(0.02, weight_decay=0.1, max_norm=0.5, eps=1e-4)
    fresh, stale = (
        run(BilevelSolver(linear, optimizer, SGD(1.0), held(n, route)), case, windows, STEPS)
        for n in (1, 3)
    )
    assert same_bits(fresh.state.lower_optimizer.steps, stale.state.lower_optimizer.steps)
    assert relative(stale.state.upper_params, fresh.state.upper_params) <= 1e-12
    assert relative(stale.state.lower_params, fresh.state.lower_params) <= 1e-12


@pytest.mark.parametrize("kind", [BilevelSolver, ResidentSolver])
@pytest.mark.parametrize(("every", "expected"), [(1, 7), (2, 4), (5, 2), (10, 1)])
def test_the_upper_loss_is_computed_once_in_so_many_upper_steps(every, expected, kind):
    case, calls = indirect(build("mlp")), {"lower": 0, "upper": 0}

    def counted(name, function):
        def counting(*arguments):
            calls[name] += 1
            return function(*arguments)

        return counting

    problem = replace(
        case.problem,
        per_example_loss=counted("lower", case.problem.per_example_loss),
        upper_loss=counted("upper", case.problem.upper_loss),
    )
    solver = kind(problem, AdamW(0.02), SGD(0.5), held(every, Dot()))
    found = run(solver, case, windows_of(case), STEPS)
    assert calls == {"lower": STEPS, "upper": expected}
    known = [info.upper_loss is not None for info in found.infos]
    assert known == [step % every == 0 for step in range(STEPS)]
    assert int(found.state.upper_steps) == STEPS
    assert all(info.hypergradient_norm > 0.0 for info in found.infos)


@pytest.mark.parametrize("route", [Dot(), Ghost(), Jvp()], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_in_place_it_is_the_same_run(route, decay):
    case = indirect(build("encoder"))
    windows = windows_of(case) if route == Dot() else [[case.batch]]
    optimizer = AdamW(0.03, weight_decay=0.1, max_norm=0.4, eps=1e-4)
    method = held(3, route, direction_decay=decay)
    pair = both(case, windows, 8, optimizer, SGD(1.0, momentum=0.5), method, upper_start=2)
    assert_same_run(*pair, 1e-12)
    assert int(pair[1].state.memory.uses) == 3


@pytest.mark.parametrize("kind", [BilevelSolver, ResidentSolver])
@pytest.mark.parametrize("decay", [0.0, 0.6])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_checkpoint_between_two_upper_gradients_goes_on_bit_for_bit(at, decay, kind):
    case = indirect(build("dropout"))
    windows = windows_of(case)
    solver = kind(case.problem, AdamW(0.02), SGD(0.5), held(3, Dot(), direction_decay=decay))

    def start():
        return solver.init(tree.map(torch.clone, case.params), case.upper_params)

    def go_on(state, steps):
        for step in steps:
            state, _ = solver.advance(state, [windows[step % 5]], case.upper_batch)
        return state

    torch.manual_seed(7)
    state = go_on(start(), range(at))
    saved = {name: leaf.clone() for name, leaf in tree.flatten(state).items()}
    random = torch.get_rng_state()
    whole = go_on(state, range(at, STEPS))
    torch.set_rng_state(random)
    assert same_bits(go_on(tree.unflatten(saved, start()), range(at, STEPS)), whole)


@pytest.mark.parametrize("kind", [BilevelSolver, ResidentSolver])
def test_a_skipped_upper_step_does_not_count(kind):
    """An upper loss that is NaN is computed again at once, a lower gradient that is has no part."""
    case = indirect(build("mlp"))

    def losses(lower, batch):
        found, features = case.problem.per_example_loss(lower, batch)
        return found * batch.get("spoil", 1.0), features

    def upper_loss(lower, upper, batch):
        return case.problem.upper_loss(lower, upper, batch) * batch.get("spoil", 1.0)

    problem = replace(case.problem, per_example_loss=losses, upper_loss=upper_loss)
    solver = kind(problem, AdamW(0.02), SGD(0.5), held(2, Dot()))
    state = solver.init(tree.map(torch.clone, case.params), case.upper_params)
    windows, nan = windows_of(case), {"spoil": math.nan}
    read, uses = [], []
    for step in range(6):
        lower, upper = windows[step % 5][0], case.upper_batch
        read.append(solver.reads_upper_batch(state))
        lower = lower | (nan if step == 3 else {})
        upper = upper | (nan if step in (0, 3) else {})
        state, _ = solver.advance(state, [[lower]], upper)
        uses.append(int(state.memory.uses))
    assert read == [True, True, False, True, True, False]
    assert uses == [0, 1, 2, 2, 1, 2]
    assert (int(state.upper_skipped), int(state.lower_skipped)) == (2, 1)
    assert tree.allfinite(state.upper_params)


def test_a_skipped_step_leaves_the_average_as_it_was_in_place():
    """The upper gradient is due and finite, the lower gradient is not."""
    case = indirect(build("mlp"))
    plain = case.problem.per_example_loss

    def losses(lower, batch):
        found, features = plain(lower, batch)
        return found * batch.get("spoil", 1.0), features

    case = replace(case, problem=replace(case.problem, per_example_loss=losses))
    windows = windows_of(case)
    windows[2] = [windows[2][0] | {"spoil": math.nan}]
    method = held(2, Dot(), direction_decay=0.6)
    pair = both(case, windows, 5, AdamW(0.02, eps=1e-4), SGD(0.5), method)
    assert_same_run(*pair, 1e-12)
    assert int(pair[1].state.lower_skipped) == 1


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_the_memory_keeps_its_structure_and_precision(decay):
    """So that a checkpoint of any step is read: also where the upper loss leaves leaves out."""
    case = cast(indirect(build("mlp")), torch.bfloat16)
    method = held(2, Dot(), direction_decay=decay)
    solver = BilevelSolver(case.problem, SGD(0.1), SGD(0.5), method)
    state = solver.init(case.params, case.upper_params)
    before = {name: leaf.dtype for name, leaf in tree.flatten(state).items()}
    for window in windows_of(case)[:3]:
        state, _ = solver.advance(state, [window], case.upper_batch)
        assert {name: leaf.dtype for name, leaf in tree.flatten(state).items()} == before
    kept = state.memory.held.average["head.weight"].dtype
    assert kept == (torch.float32 if decay else torch.bfloat16)


def test_fit_draws_upper_batches_for_the_steps_that_read_them():
    case, drawn = indirect(build("mlp")), []

    def upper_batches():
        while True:
            drawn.append(None)
            yield case.upper_batch

    solver = BilevelSolver(case.problem, SGD(0.1), SGD(0.5), held(3, Dot()), unroll_steps=2)
    state = solver.init(case.params, case.upper_params)
    rows = [window[0] for window in windows_of(case)]
    found = fit(solver, state, rows, upper_batches(), steps=10)
    assert (int(found.upper_steps), len(drawn)) == (5, 2)
    assert not solver.reads_upper_batch(found)
    solver.advance(found, [[rows[0]], [rows[1]]], UNREAD)


def test_the_audit_leaves_the_earlier_gradient_out():
    case = indirect(build("mlp"))
    windows = windows_of(case)
    solver = BilevelSolver(case.problem, SGD(0.1), SGD(0.5), held(3, Dot()))
    state = run(solver, case, windows, 2).state

    def audited(every, memory):
        torch.manual_seed(0)  # of the directions
        of = replace(solver, hypergradient=held(every, Dot()))
        return check_hypergradient(of, state._replace(memory=memory), windows[3], case.upper_batch)

    assert audited(3, state.memory) == audited(1, None)


def test_what_it_is_not_defined_for_is_refused():
    with pytest.raises(ValueError, match=r"every=2 .* choose order='upper-first'"):
        OneStep(upper_gradient_every=2)
    with pytest.raises(ValueError, match="upper_gradient_every must be at least 1, got 0"):
        OneStep(order="upper-first", upper_gradient_every=0)
    case = build("mlp")
    for kind in (BilevelSolver, ResidentSolver):
        solver = kind(case.problem, SGD(0.1), SGD(0.5), held(2, Dot()))
        state = solver.init(tree.map(torch.clone, case.params), case.upper_params)
        with pytest.raises(ValueError, match="depends on the upper parameters through the lower"):
            solver.advance(state, windows_of(case)[0:1], case.upper_batch)
