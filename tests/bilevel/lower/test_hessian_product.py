"""Hessian products against double backward, differences of gradients, and symmetry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bilevel import BilevelProblem, CentralDifference, Jvp, Reverse, tree
from bilevel.lower.hessian_product import hessian_product
from bilevel.lower.lower_pass import lower_pass
from tests.bilevel.comparing import relative
from tests.bilevel.problems import weights_from_losses
from tests.bilevel.variants import build_used, pick
from tests.bilevel.zoo import CASES, Encoder, build, make, tokens
from tests.oracles import by_double_backward, lower_gradient, random_like

ROUTES = [Jvp(), Reverse(), CentralDifference()]


def passed_at(case, batches=None, route=Jvp()):  # noqa: B008
    torch.manual_seed(11)
    batches = [case.batch] if batches is None else batches
    return lower_pass(case.problem, route, case.params, case.upper_params, batches)


def product(case, route, passed=None):
    passed = passed_at(case) if passed is None else passed
    return hessian_product(case.problem, route, passed, case.params, case.upper_params)


def used(case, direction):
    """The direction without the parameters that the loss does not use."""
    return tree.map(lambda leaf, _: leaf, direction, passed_at(case).grads)


def by_differences(case, direction, step=1e-3):
    """Differences of gradients, extrapolated to fourth order."""

    def gradient(size):
        torch.manual_seed(11)
        params = tree.axpy(size, direction, case.params)
        return lower_gradient(case.problem, params, case.upper_params, case.batch)

    def central(size):
        return tree.scale(0.5 / size, tree.axpy(-1.0, gradient(-size), gradient(size)))

    return tree.axpy(-1 / 3, central(step), tree.scale(4 / 3, central(step / 2)))


@pytest.mark.parametrize("name", CASES)
def test_every_route_is_the_hessian(name):
    """Attention with RMSNorm and SiLU, LayerNorm with GELU, convolutions with GroupNorm, ..."""
    case = build_used(name)
    vectors = [random_like(case.params, seed) for seed in (0, 1)]
    expected = [by_double_backward(case, vector) for vector in vectors]
    assert relative(by_differences(case, vectors[0]), expected[0]) <= 1e-8
    for route in ROUTES:
        hessian = product(case, route)
        limit = 1e-6 if isinstance(route, CentralDifference) else 1e-11
        for vector, right in zip(vectors, expected, strict=True):
            assert relative(hessian(vector), right) <= limit, route
        left, right = (
            tree.vdot(one, hessian(other)) for one, other in (vectors, reversed(vectors))
        )
        assert abs(float(left / right) - 1.0) <= max(limit, 1e-9)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["attention", "tiles"])
def test_unequal_micro_batches_equal_the_batch(name, route):
    case = build(name)
    vector = random_like(case.params, 0)
    pieces = [pick(case.batch, [0, 1, 2]), pick(case.batch, [3, 4])]
    apart = product(case, route, passed_at(case, pieces))(vector)
    limit = 1e-6 if isinstance(route, CentralDifference) else 1e-12
    assert relative(apart, product(case, Jvp())(vector)) <= limit


@pytest.mark.parametrize("route", ROUTES)
def test_each_micro_batch_replays_its_own_random_numbers(route):
    """Two halves with dropout, against the mean of their own Hessians; the generator stays."""
    case = build("dropout")
    vector = random_like(case.params, 0)
    pieces = [pick(case.batch, [0, 1, 2]), pick(case.batch, [3, 4])]
    passed = passed_at(case, pieces)
    state = torch.get_rng_state()
    found = product(case, route, passed)(vector)
    assert torch.equal(torch.get_rng_state(), state)
    expected = None
    for micro, share in zip(passed.micro_batches, (0.6, 0.4), strict=True):
        alone = replace(passed, micro_batches=[micro])
        term = tree.scale(share, product(case, Reverse(), alone)(vector))
        expected = term if expected is None else tree.add(term, expected)
    limit = 1e-6 if isinstance(route, CentralDifference) else 1e-11
    assert relative(found, expected) <= limit


@pytest.mark.parametrize("route", ROUTES)
def test_parameters_without_a_direction_stand_still(route):
    """The block of the others; nothing for those that stand still; zeros for one not used."""
    case = build("mlp")
    full = random_like(case.params, 0)
    some = {name: full[name] if "layers" in name or name == "unused" else None for name in full}
    filled = {name: torch.zeros_like(full[name]) if v is None else v for name, v in some.items()}
    found, whole = product(case, route)(some), product(case, Jvp())(filled)
    assert [name for name, leaf in found.items() if leaf is None] == [
        name for name, leaf in some.items() if leaf is None
    ]
    assert torch.equal(found["unused"], torch.zeros_like(full["unused"]))
    limit = 1e-6 if isinstance(route, CentralDifference) else 1e-12
    for name in (name for name in some if "layers" in name):
        assert relative(found[name], whole[name]) <= limit


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_features_of_a_weighting(route, detached):
    """Detached features are data: the weights stand still. Otherwise they move with θ."""
    torch.manual_seed(3)
    case = make(Encoder(), tokens, weights=weights_from_losses)
    case = replace(case, problem=replace(case.problem, detach_features=detached))
    weights = passed_at(case).micro_batches[0].weights.detach()

    def lower_loss(lower, upper, batch):
        losses, features = case.problem.per_example_loss(lower, batch)
        fixed = weights if detached else weights_from_losses(upper, batch, features)
        return (fixed * losses).mean()

    scalar = replace(case, problem=BilevelProblem(lower_loss, case.problem.upper_loss))
    vector = random_like(case.params, 0)
    expected = by_double_backward(scalar, vector)
    limit = 1e-6 if isinstance(route, CentralDifference) else 1e-11
    assert relative(product(case, route)(vector), expected) <= limit


@pytest.mark.parametrize("route", ROUTES)
def test_a_linear_loss_has_no_curvature(route):
    problem = BilevelProblem(
        lambda lower, upper, batch: lower["w"] @ batch + lower["b"], lambda lower, upper, batch: 0.0
    )
    params = {"w": torch.ones(3, dtype=torch.float64), "b": torch.tensor(2.0, dtype=torch.float64)}
    passed = lower_pass(problem, Jvp(), params, {}, [torch.arange(3.0, dtype=torch.float64)])
    found = hessian_product(problem, route, passed, params, {})(tree.map(torch.ones_like, params))
    limit = 1e-9 if isinstance(route, CentralDifference) else 0.0
    assert float(tree.norm(found)) <= limit
    assert found["b"].shape == ()


def test_parameters_and_direction_are_not_changed():
    case = build("encoder")
    params = tree.map(torch.clone, case.params)
    vector = random_like(case.params, 0)
    for route in ROUTES:
        product(case, route)(vector)
        assert all(torch.equal(params[name], case.params[name]) for name in params)
    again = random_like(case.params, 0)
    assert all(torch.equal(vector[name], again[name]) for name in vector)


def test_bfloat16():
    """The exact routes round as the model does; central differences shift float32 copies."""
    case = build("encoder")
    vector = random_like(case.params, 0)
    expected = product(case, Jvp())(vector)

    def narrow(value):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.bfloat16() if floating else value

    half = replace(
        case,
        params=tree.map(narrow, case.params),
        upper_params=tree.map(narrow, case.upper_params),
    )
    exact = product(replace(case, params=tree.map(torch.Tensor.double, half.params)), Jvp())(vector)
    assert relative(exact, expected) <= 0.1
    for route, limit in ((Jvp(), 0.1), (Reverse(), 0.1), (CentralDifference(), 5e-3)):
        found = product(half, route)(vector)
        wide = tree.map(torch.Tensor.double, found)
        assert relative(wide, exact) <= limit, route
