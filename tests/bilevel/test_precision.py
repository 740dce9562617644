"""Every route in 16 bits and under autocast, against float64; on the CPU.

Measured on these problems (torch 2.13, CPU): the exact routes and widened central differences are
within 1.1 % in bfloat16 and under autocast, and within 0.2 % in float16. The bounds leave a factor
of two for other kernels. The error is that of 16-bit gradients as such: v and the lower gradient
are rounded whatever the route.
"""

from __future__ import annotations

from contextlib import nullcontext
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
    Penalty,
    PerExample,
    Reverse,
    tree,
)
from tests.bilevel.comparing import relative
from tests.bilevel.run_case import warm
from tests.bilevel.run_window import run_step, run_window
from tests.bilevel.variants import cast, pick
from tests.bilevel.zoo import build

OPTIMIZERS = {
    "sgd": SGD(0.3, state_dtype=torch.float32),
    "adamw": AdamW(0.05, (0.8, 0.9), 1e-3, weight_decay=0.1, state_dtype=torch.float32),
}
METHODS = [
    OneStep(Auto()),
    OneStep(PerExample()),
    OneStep(PerExample(entries_limit=0)),
    OneStep(Jvp()),
    OneStep(Reverse()),
    OneStep(CentralDifference()),
    OneStep(Ghost(), "upper-first"),
    OneStep(Jvp(), "upper-first"),
    OneStep(CentralDifference(), "upper-first"),
]
BOUNDS = {"bfloat16": 2.5e-2, "float16": 4e-3, "around": 2.5e-2, "inside": 2.5e-2}


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def under_autocast(problem):
    """The same problem, whose losses enter autocast themselves."""

    def wrap(loss):
        def wrapped(*arguments):
            with autocast():
                return loss(*arguments)

        return wrapped

    return replace(
        problem,
        per_example_loss=wrap(problem.per_example_loss),
        upper_loss=wrap(problem.upper_loss),
    )


def in_precision(case, state, setting):
    """Case and optimizer state in that setting, and the context for the step."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(setting, torch.float32)
    case = cast(case, dtype)
    if setting == "inside":
        case = replace(case, problem=under_autocast(case.problem))
    moments = [tree.map(torch.Tensor.float, moment) for moment in state[1:]]
    state = state._replace(first_moment=moments[0], second_moment=moments[1])
    return case, state, autocast() if setting == "around" else nullcontext()


def error_of(name, optimizer, method, setting, *, singles=False):
    case = build(name)
    wide = replace(optimizer, state_dtype=None)
    params, state = warm(case, wide)
    case = replace(case, params=params)
    arguments = case.upper_params, state, [case.batch], case.upper_batch
    reference = replace(method, route=Reverse())
    exact = run_step(reference, case.problem, wide, params, *arguments).hypergradient
    case, state, context = in_precision(case, state, setting)
    batches = [pick(case.batch, [row]) for row in range(5)] if singles else [case.batch]
    with context:
        result = run_step(
            method,
            case.problem,
            optimizer,
            case.params,
            case.upper_params,
            state,
            batches,
            case.upper_batch,
        )
    assert [micro.note for micro in result.passed.micro_batches] == [None] * len(batches)
    for leaf_name, leaf in result.lower_params.items():
        assert leaf.dtype == case.params[leaf_name].dtype
    for leaf in tree.leaves(result.hypergradient):
        assert leaf.dtype == torch.float32
    return relative(tree.map(torch.Tensor.double, result.hypergradient), exact)


@pytest.mark.parametrize("setting", BOUNDS)
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("mlp", "sgd"),
        ("mlp", "adamw"),
        ("attention", "adamw"),
        ("encoder", "sgd"),
        ("vision", "sgd"),
    ],
)
def test_every_route_works(name, optimizer, setting):
    for method in METHODS:
        error = error_of(name, OPTIMIZERS[optimizer], method, setting)
        assert error <= BOUNDS[setting], method


@pytest.mark.parametrize("setting", BOUNDS)
@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
def test_dot_on_single_examples(order, setting):
    for name in ("mlp", "attention"):
        error = error_of(name, OPTIMIZERS["adamw"], OneStep(Dot(), order), setting, singles=True)
        assert error <= BOUNDS[setting]


@pytest.mark.parametrize("setting", ["bfloat16", "float16", "around"])
def test_differences_that_are_not_widened_are_coarse(setting):
    """The step follows the precision of the computation; what is left is percents, not units."""
    method = OneStep(CentralDifference(widen=False))
    fixed = OneStep(CentralDifference(radius=1e-3, widen=False))
    for name in ("mlp", "attention", "encoder", "vision"):
        error = error_of(name, OPTIMIZERS["sgd"], method, setting)
        assert error <= (0.05 if setting == "float16" else 0.1)
        assert error_of(name, OPTIMIZERS["sgd"], fixed, setting) > 2 * error


def test_an_autocast_inside_the_loss_gets_its_step_if_not_widened():
    for name in ("mlp", "attention"):
        errors = [
            error_of(
                name, OPTIMIZERS["sgd"], OneStep(CentralDifference(step, widen=False)), "inside"
            )
            for step in (None, 5e-4)
        ]
        assert errors[0] <= 0.1 < errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [*METHODS, Penalty(10.0)], ids=str)
def test_a_run_keeps_precisions(method, dtype):
    """θ stays in 16 bits, moments and φ in float32; nothing is skipped."""
    case = cast(build("attention"), dtype)
    solver = BilevelSolver(case.problem, OPTIMIZERS["adamw"], SGD(0.1), method)
    state = solver.init(case.params, case.upper_params)
    for _ in range(3):
        state, info = solver.step(state, [case.batch], case.upper_batch)
    assert int(state.upper_steps) == 3
    assert {leaf.dtype for leaf in tree.leaves(state.lower_params)} == {dtype}
    assert {leaf.dtype for leaf in tree.leaves(state.upper_params)} == {torch.float32}
    moments = tree.leaves(state.lower_optimizer[1:])
    assert {leaf.dtype for leaf in moments} == {torch.float32}
    assert bool(tree.allfinite((state.lower_params, state.upper_params)))
    assert float(info.hypergradient_norm) > 0.0


def test_penalty_in_bfloat16():
    """λ multiplies the difference of losses that are rounded: the error grows with λ."""
    case = build("mlp")
    found = {}
    for setting in ("float64", "bfloat16"):
        wide = setting == "float64"
        here = case if wide else cast(case, torch.bfloat16)
        optimizer = SGD(0.05, state_dtype=None if wide else torch.float32)
        method = Penalty(10.0, steps=4)
        memory = method.init(optimizer, here.params, here.upper_params)
        found[setting] = run_window(
            method,
            here.problem,
            optimizer,
            here.params,
            here.upper_params,
            optimizer.init(here.params),
            [[here.batch]],
            here.upper_batch,
            memory,
        ).hypergradient
    narrow = tree.map(torch.Tensor.double, found["bfloat16"])
    assert 0.0 < relative(narrow, found["float64"]) <= 0.5


def test_a_bfloat16_second_moment_never_decays():
    """Why state_dtype=torch.float32 belongs to 16-bit parameters: 0.999 s rounds to s."""
    params = {"w": torch.linspace(1.0, 2.0, 129, dtype=torch.bfloat16)}
    zeros = tree.zeros_like(params)
    for dtype, stuck in ((None, True), (torch.float32, False)):
        optimizer = AdamW(0.1, state_dtype=dtype)
        state = optimizer.init(params)
        state = state._replace(second_moment=tree.map(lambda p, m: p.to(m), params, state[2]))
        _, new = optimizer.update(zeros, state, params)
        assert torch.equal(new.second_moment["w"], state.second_moment["w"]) == stuck
