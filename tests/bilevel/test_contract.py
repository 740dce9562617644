"""What is claimed of hypergradient × optimizer × layer × precision, and where it is tested.

=====================  ==================================================================
claim                  tests (float64 unless said)
=====================  ==================================================================
OneStep                every route × {SGD, momentum, Nesterov, Adam, AdamW} × every layer of
                       the zoo: test_one_step; RMSProp, Adagrad: here
Unrolled               {SGD, momentum, Adam} × every layer × {Jvp, Reverse, differences}:
                       test_unrolled; the other optimizers: here; TorchOpt's graph for all
Implicit               closed forms, Newton's solutions: test_implicit; every layer: here
Penalty                closed forms, layers, error 1/λ: test_penalty
float32, 16 bits       OneStep: test_precision; Unrolled: test_unrolled; Implicit: here
truncated ↔ Neumann    test_implicit; truncated to one step ↔ OneStep: here, every optimizer
K → ∞ ↔ implicit       at the rate 1 − η λ_min per step: test_implicit
ε → 0 ↔ exact          second order, through one step: test_finite_difference; several: here
=====================  ==================================================================

The layers: linear, ReLU, bare scales; attention with RMSNorm, SiLU, rotary-free causal masks;
tied and frozen parameters; dropout; LayerNorm, GELU, embeddings; convolutions, GroupNorm; tiles.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel import (
    CentralDifference,
    ConjugateGradient,
    Implicit,
    Jvp,
    OneStep,
    Reverse,
    Unrolled,
    tree,
)
from tests.bilevel.comparing import relative
from tests.bilevel.run_case import OPTIMIZERS, run_case_window, warm
from tests.bilevel.run_window import run_window
from tests.bilevel.variants import build_used, cast, pick
from tests.bilevel.zoo import CASES, build
from tests.oracles import by_double_backward, random_like, slope, upper_after_window

OTHERS = ("nesterov", "adamw", "rmsprop", "adagrad")
PIECES = ([0, 1, 2, 3, 4], [1, 2, 3])


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", CASES)
def test_two_steps_of_every_optimizer_through_every_layer(name, kind):
    case, optimizer = build(name), OPTIMIZERS[kind]
    point = warm(case, optimizer)
    batches = [[pick(case.batch, rows)] for rows in PIECES]
    found = {
        method: run_case_window(case, optimizer, method, batches=batches, point=point).hypergradient
        for method in (Unrolled(), Unrolled(1), OneStep(Jvp()), OneStep(Reverse()))
    }
    for one_step in (OneStep(Jvp()), OneStep(Reverse())):
        assert relative(found[Unrolled(1)], found[one_step]) <= 1e-10
    for method in (Unrolled(), OneStep(Jvp())):
        torch.manual_seed(11)
        function = upper_after_window(
            case.problem,
            optimizer,
            *point,
            batches,
            case.upper_batch,
            at=case.upper_params,
            unrolled=method.exact_steps(2),
        )
        direction = random_like(case.upper_params, 0)
        # A longer difference crosses a kink of an activation.
        expected = slope(function, case.upper_params, direction, 2e-5)
        value = float(tree.vdot(found[method], direction))
        assert abs(value - expected) <= 1e-6 * max(abs(expected), 1e-3)


def implicit_at(case, implicit):
    """Where the case is, without a lower step that would move it."""
    standing = OPTIMIZERS["sgd"]
    standing = replace(standing, lr=0.0)
    torch.manual_seed(11)
    return run_window(
        implicit,
        case.problem,
        standing,
        case.params,
        case.upper_params,
        standing.init(case.params),
        [[case.batch]],
        case.upper_batch,
    )


@pytest.mark.parametrize("name", CASES)
def test_implicit_through_every_layer(name):
    """(H + δ) q = v and dF = ∂F/∂φ − ∂/∂φ ⟨∇L, q⟩, both by the plainest double backward."""
    case, damping = build_used(name), 20.0
    solver = ConjugateGradient(300, 1e-12, damping)
    result = implicit_at(case, Implicit(solver, stationarity_tolerance=None))
    q = dict(result.memory.solution)

    lower = {key: leaf.clone().requires_grad_() for key, leaf in case.params.items()}
    upper = {key: leaf.clone().requires_grad_() for key, leaf in case.upper_params.items()}
    torch.manual_seed(11)
    value = case.problem.upper_loss(lower, upper, case.upper_batch)
    found = torch.autograd.grad(value, [*lower.values(), *upper.values()], allow_unused=True)
    v = dict(zip(lower, found[: len(lower)], strict=True))
    direct = dict(zip(upper, found[len(lower) :], strict=True))

    curved = by_double_backward(case, q)
    left = {key: curved[key] + damping * q[key] for key in q}
    assert relative(left, v) <= 1e-10

    torch.manual_seed(11)
    with sdpa_kernel(SDPBackend.MATH):
        loss = case.problem.lower_loss(lower, upper, case.batch)
        grads = torch.autograd.grad(loss, list(lower.values()), create_graph=True)
        along = sum((grad * q[key]).sum() for key, grad in zip(lower, grads, strict=True))
        mixed = torch.autograd.grad(along, list(upper.values()))
    expected = {
        key: -term if direct[key] is None else direct[key] - term
        for key, term in zip(upper, mixed, strict=True)
    }
    assert relative(result.hypergradient, expected) <= 1e-10


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str
)
@pytest.mark.parametrize("name", ["attention", "encoder", "vision"])
def test_implicit_in_other_precisions(name, dtype, limit):
    """Against float64 from the same numbers; φ in float32."""
    case = build(name)
    implicit = Implicit(ConjugateGradient(30, 1e-6, 20.0), stationarity_tolerance=None)
    narrow = cast(case, dtype)
    found = implicit_at(narrow, implicit).hypergradient
    exact = implicit_at(cast(narrow, torch.float64), implicit).hypergradient
    assert relative(tree.map(Tensor.double, found), exact) <= limit


def test_differences_through_several_steps_are_of_second_order():
    """The error of every product falls with the square of its step, and so does their sum's."""
    case, optimizer = build("encoder"), OPTIMIZERS["adamw"]
    point = warm(case, optimizer)
    exact = run_case_window(case, optimizer, Unrolled(), point=point).hypergradient
    errors = [
        relative(
            run_case_window(
                case, optimizer, Unrolled(product=CentralDifference(step)), point=point
            ).hypergradient,
            exact,
        )
        for step in (4e-3, 2e-3, 1e-3)
    ]
    orders = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
    assert all(abs(order - 2.0) <= 0.05 for order in orders)
