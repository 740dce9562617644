"""Both executions take the same steps, to rounding.

To the bit only where the arithmetic is the same (see ``test_update``) and every parameter has
memory of its own: the functional step leaves small ones in pieces of one block of memory, and how a
matrix product rounds depends on where its operands lie.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bilevel import (
    SGD,
    AdaDelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Auto,
    BilevelSolver,
    CentralDifference,
    Dot,
    Ghost,
    Identity,
    Jvp,
    NAdam,
    OneStep,
    PerExample,
    RAdam,
    ResidentSolver,
    Reverse,
    ReweightingProblem,
    RMSProp,
    StepDecay,
    WarmupCosine,
    tree,
)
from bilevel.resident import pieces, plain, upper_first
from tests.bilevel.comparing import relative, same_bits
from tests.bilevel.problems import below_the_network
from tests.bilevel.resident.both import assert_close, assert_same_run, both, run
from tests.bilevel.variants import cast, pick
from tests.bilevel.zoo import build

WARM = WarmupCosine(0.03, 2, 20)
# Above the rounding of gradients that are 0 in exact arithmetic, such as that of a key's bias, of
# which an eps of 1e-8 would make steps.
EPS = 1e-4
OPTIMIZERS = [
    SGD(0.1),
    SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.05, max_norm=0.4),
    Adam(WARM, weight_decay=0.1, eps=EPS),
    AdamW(StepDecay(0.03, 2, 0.5), weight_decay=0.1, max_norm=0.4, eps=EPS),
    RMSProp(0.01, weight_decay=0.1, max_norm=0.4),
    Adagrad(0.05, max_norm=0.4),
    NAdam(0.02, max_norm=0.4),
    RAdam(0.02, weight_decay=0.1),
    Adamax(0.02, max_norm=0.4),
    AdaDelta(1.0, max_norm=0.4),
]
UPPER = SGD(1.0, momentum=0.5)
WARMED = 3  # a cold Adam has a hypergradient of almost 0, all rounding


@pytest.fixture(params=[None, 1, 100, 1 << 20], ids=["leaves", "pieces of one", "pieces", "one"])
def gradient(request, monkeypatch):
    """How the gradient of a single example is kept: as on a CPU, or in pieces as on a device."""
    if request.param is not None:
        for module in (plain, upper_first):
            monkeypatch.setattr(module, "in_pieces", lambda _: True)
        monkeypatch.setattr(pieces, "ENTRIES", request.param)


def singles(case, rows=(0, 1, 2, 3, 4)):
    return [pick(case.batch, [row]) for row in rows]


def one_by_one(case):
    """Five lower steps of one example each; the weight of the last is 0."""
    return [[one] for one in singles(case)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: type(one).__name__)
@pytest.mark.usefixtures("gradient")
def test_lower_first_equals_the_functional_step(optimizer):
    case = build("encoder")
    pair = both(case, one_by_one(case), 8, optimizer, UPPER, OneStep(Dot()), upper_start=WARMED)
    assert_same_run(*pair, 1e-12)
    assert int(pair[1].state.upper_steps) == 5


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("route", [Dot(), Ghost()], ids=str)
@pytest.mark.usefixtures("gradient")
def test_upper_first_equals_the_functional_step(route, optimizer):
    case = build("encoder")
    windows = [singles(case)] if route == Dot() else [[case.batch]]
    functional, resident = both(
        case, windows, 4, optimizer, UPPER, OneStep(route, "upper-first", 0.5)
    )
    assert_same_run(functional, resident, 1e-12)


@pytest.mark.parametrize("name", ["mlp", "tied", "frozen", "dropout", "vision", "tiles"])
@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
@pytest.mark.usefixtures("gradient")
def test_every_kind_of_layer(name, order):
    case = build(name)
    optimizer = AdamW(0.03, weight_decay=0.1, max_norm=0.5, eps=EPS)
    method = OneStep(Dot(), order)
    pair = both(case, one_by_one(case), 8, optimizer, UPPER, method, upper_start=WARMED)
    assert_same_run(*pair, 1e-12)


ROUTES = [Auto(), Ghost(), PerExample(), Jvp(), Reverse(), CentralDifference()]


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("name", ["mlp", "dropout"])
@pytest.mark.usefixtures("gradient")
def test_every_route_upper_first(route, name):
    """Two micro-batches of unequal size, with an average of v."""
    case = build(name)
    windows = [[pick(case.batch, [0, 1, 2]), pick(case.batch, [3, 4])]]
    method = OneStep(route, "upper-first", direction_decay=0.7)
    functional, resident = both(case, windows, 4, RMSProp(0.01, max_norm=0.5), UPPER, method)
    assert_same_run(functional, resident, 1e-12)


@pytest.mark.usefixtures("gradient")
def test_a_problem_without_examples_upper_first():
    case = below_the_network()
    method = OneStep(Auto(), "upper-first")
    functional, resident = both(case, [[case.batch]], 3, SGD(0.05, momentum=0.9), UPPER, method)
    assert_same_run(functional, resident, 1e-12)


@pytest.mark.usefixtures("gradient")
def test_weights_that_see_the_parameters_upper_first():
    case = build("mlp")
    problem = replace(
        case.problem,
        weights=lambda upper, batch, features: (
            upper["table"][batch["index"]] * torch.tanh(features["losses"])
        ),
        detach_features=False,
    )
    case = replace(case, problem=problem)
    method = OneStep(Jvp(), "upper-first")
    pair = both(case, [[case.batch]], 3, SGD(0.05), UPPER, method)
    assert_same_run(*pair, 1e-12)


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
@pytest.mark.usefixtures("gradient")
def test_groups_and_decay_masks(order):
    case = build("encoder")
    optimizer = AdamW(
        {"head": WARM, "body": 0.01},
        group=lambda name: "head" if name == "out" else "body",
        weight_decay={"head": 0.3, "body": 0.1},
        decay_mask=lambda name: "bias" not in name,
        max_norm=0.5,
        eps=EPS,
    )
    method = OneStep(Dot(), order)
    pair = both(case, one_by_one(case), 8, optimizer, UPPER, method, upper_start=WARMED)
    assert_same_run(*pair, 1e-12)


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
@pytest.mark.usefixtures("gradient")
def test_windows_of_several_steps_that_start_late(order):
    case = build("dropout")
    pair = both(
        case,
        one_by_one(case),
        12,
        AdamW(0.02, max_norm=0.5, eps=EPS),
        UPPER,
        OneStep(Dot(), order),
        unroll_steps=3,
        upper_start=4,
    )
    assert_same_run(*pair, 1e-12)
    assert int(pair[1].state.upper_steps) == 2


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
@pytest.mark.usefixtures("gradient")
def test_an_update_derivative_of_the_literature(order):
    case = build("mlp")
    method = OneStep(Dot(), order, update_derivative=Identity())
    pair = both(case, one_by_one(case), 5, RMSProp(0.01, max_norm=0.5), UPPER, method)
    assert_same_run(*pair, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
@pytest.mark.usefixtures("gradient")
def test_moments_of_another_precision_than_the_parameters(order, dtype):
    case = cast(build("mlp"), dtype)
    optimizer = AdamW(0.02, max_norm=0.5, state_dtype=torch.float64)
    functional, resident = both(case, one_by_one(case), 5, optimizer, UPPER, OneStep(Dot(), order))
    eps = torch.finfo(dtype).eps
    for name in ("lower_params", "upper_params", "lower_optimizer"):
        assert_close(getattr(resident.state, name), getattr(functional.state, name), 4 * eps)


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
def test_an_upper_level_that_does_not_move_leaves_plain_training(order):
    """Whatever the weights are; in float32, where any other sum would show."""
    case = cast(build("dropout"), torch.float32)
    solver = ResidentSolver(
        case.problem, AdamW(0.03, max_norm=0.5), SGD(0.0), OneStep(Dot(), order)
    )
    with_upper = run(solver, case, one_by_one(case), 5)
    without = run(solver, case, one_by_one(case), 5, upper=False)
    assert with_upper.infos[0].hypergradient_norm > 0.0
    assert same_bits(with_upper.state.lower_params, without.state.lower_params)
    assert same_bits(with_upper.state.lower_optimizer, without.state.lower_optimizer)


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
def test_with_weights_of_one_it_is_torchs_own_training(order):
    case = cast(build("encoder"), torch.float32)
    ones = {"table": torch.ones(5), "scale": torch.ones(())}
    case = replace(case, upper_params=ones)
    solver = ResidentSolver(
        case.problem, AdamW(0.03, weight_decay=0.1), SGD(0.0), OneStep(Dot(), order)
    )
    found = run(solver, case, one_by_one(case), 5)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.params.items()}
    torchs = torch.optim.AdamW(leaves.values(), lr=0.03, weight_decay=0.1, fused=True)
    for one in singles(case):
        torchs.zero_grad()
        case.problem.per_example_loss(leaves, one)[0].mean().backward()
        torchs.step()
    assert same_bits(found.state.lower_params, tree.map(torch.Tensor.detach, leaves))


WIDE = 260
"""The weight of a layer is too large for a block of several parameters (``optimizers.buckets``)."""


def wide_run(kind, optimizer, method, batches):
    """Three steps in float32 of two layers without small parameters."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDE, WIDE, bias=False) for _ in range(2)]
    module = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
    theta = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}

    def outputs(theta, batch):
        return torch.func.functional_call(module, theta, (batch["x"],))

    problem = ReweightingProblem(
        lambda theta, batch: (outputs(theta, batch).square().mean(1), None),
        lambda phi, batch, _: 2 * torch.sigmoid(phi[batch["i"]]),
        lambda theta, phi, batch: (outputs(theta, batch) - 1).square().mean(),
    )
    solver = kind(problem, optimizer, SGD(50.0, momentum=0.5), method, accumulation=len(batches))
    state = solver.init(theta, torch.linspace(-0.5, 0.5, 4))
    for _ in range(3):
        state, _ = solver.advance(state, [batches], batches[0])
    return state


@pytest.mark.parametrize("route", [Dot(), Ghost()], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: type(one).__name__)
def test_in_float32_upper_first_gives_the_same_bits_but_for_the_fused_kernel(optimizer, route):
    draw = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(1, WIDE, generator=draw), "i": torch.tensor([i])} for i in range(4)]
    together = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    batches = rows[:3] if route == Dot() else [together]
    method = OneStep(route, "upper-first", 0.5)
    expected, found = (
        wide_run(kind, optimizer, method, batches) for kind in (BilevelSolver, ResidentSolver)
    )
    assert int(found.upper_steps) == 3
    pairs = [
        (getattr(found, name), getattr(expected, name))
        for name in ("lower_params", "upper_params", "lower_optimizer", "memory")
    ]
    if type(optimizer) in (Adam, AdamW):
        assert not same_bits(*pairs[0])
        for pair in pairs:
            assert_close(*pair, 5e-6)
    else:
        assert all(same_bits(*pair) for pair in pairs)


def spoiled(case):
    """The case with losses that are NaN where a batch says so."""

    def per_example_loss(lower, batch):
        losses, features = case.problem.per_example_loss(lower, batch)
        return losses * batch.get("spoil", 1.0), features

    return replace(case, problem=replace(case.problem, per_example_loss=per_example_loss))


@pytest.mark.parametrize(
    "method",
    [OneStep(Dot()), OneStep(Dot(), "upper-first"), OneStep(Ghost(), "upper-first", 0.6)],
    ids=str,
)
@pytest.mark.parametrize("row", [0, 4], ids=["weight", "weight of 0"])
def test_steps_that_are_not_finite_are_left_out_alike(method, row):
    """An example whose loss is NaN; with a weight of 0 it has no part in the step."""
    case = spoiled(build("mlp"))
    windows = one_by_one(case)
    windows[1] = [pick(case.batch, [row]) | {"spoil": math.nan}]
    pair = both(case, windows, 4, RMSProp(0.01, max_norm=0.5), UPPER, method)
    assert_same_run(*pair, 1e-12)
    assert int(pair[1].state.lower_skipped) == (1 if row == 0 else 0)


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
def test_upper_losses_that_are_not_finite_leave_φ_alike(order):
    case = build("mlp")
    nothing = case.upper_batch | {
        "inputs": {"x": case.upper_batch["inputs"]["x"] * float("inf")},
    }
    case = replace(case, upper_batch=nothing)
    decay = 0.6 if order == "upper-first" else 0.0
    method = OneStep(Dot(), order, direction_decay=decay)
    pair = both(case, one_by_one(case), 3, RMSProp(0.01), UPPER, method)
    assert_same_run(*pair, 1e-12)
    assert int(pair[1].state.upper_skipped) == 3
    assert same_bits(pair[1].state.upper_params, case.upper_params)
    assert all(float(leaf.abs().sum()) == 0.0 for leaf in tree.leaves(pair[1].state.memory))


def test_a_hypergradient_that_is_not_finite_does_not_enter_the_average():
    """v is finite, the weights' derivative is not: φ, its optimizer and the average stay."""
    case = build("mlp")

    def weights(upper, batch, features):
        edge = upper["scale"] * batch.get("edge", 1.0)
        return upper["table"][batch["index"]] + torch.sqrt(edge) - torch.sqrt(edge.detach())

    case = replace(case, problem=replace(case.problem, weights=weights))
    windows = one_by_one(case)
    windows[1] = [windows[1][0] | {"edge": 0.0}]
    method = OneStep(Dot(), "upper-first", direction_decay=0.6)
    pair = both(case, windows, 4, RMSProp(0.01), UPPER, method)
    assert int(pair[1].state.upper_skipped) == 1
    assert_same_run(*pair, 1e-12)


def test_the_hypergradient_is_that_of_finite_differences():
    """Through ResidentSolver's own steps: the upper loss after one of them, by φ moved by hand."""
    case = build("attention")
    warm, measured = one_by_one(case)[:3], one_by_one(case)[1]

    def solver(upper):
        return ResidentSolver(case.problem, AdamW(0.02, weight_decay=0.1), upper, OneStep(Dot()))

    def before():
        return run(solver(SGD(0.0)), case, warm, 3, upper=False).state

    def upper_loss_at(upper_params):
        state, _ = solver(SGD(0.0)).advance(
            before()._replace(upper_params=upper_params), [measured]
        )
        return float(case.problem.upper_loss(state.lower_params, upper_params, case.upper_batch))

    start = before()
    moved, _ = solver(SGD(1.0)).advance(start, [measured], case.upper_batch)
    found = tree.axpy(-1.0, moved.upper_params, case.upper_params)
    for name, leaf in case.upper_params.items():
        for entry in range(leaf.numel()):
            step = torch.zeros(leaf.numel(), dtype=leaf.dtype)
            step[entry] = 1e-5
            ahead, behind = (
                upper_loss_at(case.upper_params | {name: leaf + sign * step.view(leaf.shape)})
                for sign in (1.0, -1.0)
            )
            slope = (ahead - behind) / 2e-5
            assert abs(float(found[name].view(-1)[entry]) - slope) < 1e-7


def test_the_module_may_own_the_parameters():
    """``module_params``: the module is trained where it is, a tied and a frozen parameter too."""
    from bilevel import functional
    from tests.bilevel.zoo import Language, tokens

    torch.manual_seed(0)
    module = Language(tied=True).double()
    module.block.k.requires_grad_(False)
    inputs = [{"x": tokens(1)["tokens"], "y": torch.tensor([row]), "i": row} for row in range(3)]
    meta = {"x": tokens(4)["tokens"], "y": torch.arange(4)}
    f = functional(module)

    def losses(params, batch):
        return torch.nn.functional.cross_entropy(
            f(params, batch["x"]), batch["y"], reduction="none"
        )

    problem = ReweightingProblem(
        lambda theta, batch: (losses(theta, batch), None),
        lambda phi, batch, features: phi[batch["i"]][None],
        lambda theta, phi, batch: losses(theta, batch).mean(),
    )
    phi = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    states = []
    for kind, params in ((BilevelSolver, f.params), (ResidentSolver, f.module_params)):
        solver = kind(problem, AdamW(0.02), SGD(0.5), OneStep(Dot()))
        state = solver.init(params, phi)
        for batch in inputs:
            state, _ = solver.step(state, [batch], meta)
        states.append(state)
    functional_state, resident_state = states
    assert relative(resident_state.upper_params, functional_state.upper_params) < 1e-12
    own = dict(module.named_parameters())
    for name, leaf in functional_state.lower_params.items():
        assert relative(own[name].detach(), leaf) < 1e-12
        assert own[name].data_ptr() == resident_state.lower_params[name].data_ptr()
    assert module.head.weight is module.embed.weight
