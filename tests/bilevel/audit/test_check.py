"""The public audit: it passes what is right, and says what is wrong with what is not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from bilevel import (
    SGD,
    Adam,
    AdamW,
    Auto,
    BilevelSolver,
    ConjugateGradient,
    Ghost,
    Identity,
    Implicit,
    Jvp,
    OneStep,
    Penalty,
    PerExample,
    ReweightingProblem,
    StationarityWarning,
    Unrolled,
    check_hypergradient,
    tree,
)
from tests.bilevel.problems import below_the_network
from tests.bilevel.quadratic import Quadratic
from tests.bilevel.variants import pick
from tests.bilevel.zoo import build, make, tokens, vectors

DIFFERENTIATED = {"differentiate_clip": True}


def audit(case, one_step, optimizer=None, batches=None, **options):
    optimizer = Adam(0.05, (0.8, 0.9), 1e-3) if optimizer is None else optimizer
    batches = [case.batch] if batches is None else batches
    solver = BilevelSolver(case.problem, optimizer, SGD(0.1), one_step, accumulation=len(batches))
    state = solver.init(case.params, case.upper_params)
    for _ in range(2):
        state, _ = solver.step(state, batches, None)
    before, random = tree.map(torch.clone, state), torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    check = check_hypergradient(
        solver, state, batches, case.upper_batch, generator=generator, **options
    )
    assert torch.equal(torch.get_rng_state(), random)
    for left, right in zip(tree.leaves(state), tree.leaves(before), strict=True):
        assert torch.equal(left, right)
    return check


@pytest.mark.parametrize("one_step", [OneStep(), OneStep(Jvp(), direction_decay=0.9)], ids=str)
@pytest.mark.parametrize(
    "optimizer",
    [AdamW(0.05, eps=1e-3, max_norm=0.1), SGD(0.2, 0.9, max_norm=0.1, differentiate_clip=True)],
    ids=["constant clip scale", "differentiated clip"],
)
@pytest.mark.parametrize("name", ["dropout", "tiles"])
def test_right_hypergradients_agree(name, optimizer, one_step):
    check = audit(build(name), one_step, optimizer)
    assert check
    assert check.outcome == "agrees"
    assert check.relative_error < 1e-6
    assert check.errors[check.best_step] == check.relative_error
    assert check.lower_gradient_error < 1e-12
    assert check.approximation_error is None
    assert str(check).startswith("hypergradient agrees: relative error ")


def test_a_generic_problem_agrees():
    assert audit(below_the_network(), OneStep())


def test_upper_first_agrees_with_what_it_claims_and_reports_how_far_that_is_from_exact():
    case = build("mlp")
    small = audit(case, OneStep(Ghost(), "upper-first"), SGD(0.01))
    large = audit(case, OneStep(Ghost(), "upper-first"), SGD(0.3))
    assert small
    assert large
    assert 0.0 < small.approximation_error < large.approximation_error < 0.5
    adam = audit(case, OneStep(Ghost(), "upper-first"))
    assert adam
    assert "away from the true derivative" in str(adam)


@dataclass(frozen=True)
class Doubled(SGD):
    """A derivative that is twice too large."""

    def grads_vjp(self, grads, state, params, params_bar):
        return tree.scale(2.0, super().grads_vjp(grads, state, params, params_bar))


@pytest.mark.parametrize("route", [Auto(), Jvp()])
def test_a_wrong_hypergradient_disagrees(route):
    check = audit(build("attention"), OneStep(route), Doubled(0.3))
    assert not check
    assert check.outcome == "disagrees"
    assert 0.3 < check.relative_error < 0.7
    assert "look for" in str(check)


def test_a_detached_weight_disagrees():
    """The direct term alone is not the hypergradient."""

    def weights(upper, batch, features):
        return upper["table"].detach()[batch["index"]] * upper["scale"]

    torch.manual_seed(3)
    assert audit(make(Mlp(), vectors, weights=weights), OneStep()).outcome == "disagrees"


def audit_window(case, method, optimizer, steps=3, **options):
    """Audit a window of steps on other examples each."""
    pieces = ([0, 1, 2, 3, 4], [1, 2, 3], [3, 4])
    batches = [[pick(case.batch, pieces[step % 3])] for step in range(steps)]
    solver = BilevelSolver(case.problem, optimizer, SGD(0.1), method, unroll_steps=steps)
    state, _ = solver.window(solver.init(case.params, case.upper_params), batches)
    generator = torch.Generator().manual_seed(0)
    random = torch.get_rng_state()
    check = check_hypergradient(
        solver, state, batches, case.upper_batch, generator=generator, **options
    )
    assert torch.equal(torch.get_rng_state(), random)
    return check


@pytest.mark.parametrize("method", [Unrolled(), Unrolled(2), Unrolled(1, replay=1)], ids=str)
@pytest.mark.parametrize("clip", [{}, {"max_norm": 0.1}, {"max_norm": 0.1, **DIFFERENTIATED}])
def test_unrolled_hypergradients_agree_through_their_window(method, clip):
    check = audit_window(build("dropout"), method, Adam(0.05, (0.8, 0.9), 1e-2, **clip))
    assert check
    assert check.relative_error < 1e-5
    assert check.lower_gradient_error == 0.0
    assert check.approximation_error is None


@dataclass(frozen=True)
class Forgetful(Adam):
    """A derivative that loses what reaches the step through the moments."""

    def vjp(self, grads, state, params, params_bar, state_bar=None):
        return super().vjp(grads, state, params, params_bar, None)


def test_a_wrong_derivative_within_the_window_disagrees():
    optimizer = Forgetful(0.05, (0.8, 0.9), 1e-2)
    assert audit_window(build("mlp"), Unrolled(1), optimizer)  # no moments to go through
    check = audit_window(build("mlp"), Unrolled(), optimizer)
    assert check.outcome == "disagrees"
    assert check.relative_error > 1e-2


def test_another_convention_agrees_with_what_it_claims_and_reports_the_distance():
    check = audit(build("mlp"), OneStep(Jvp(), update_derivative=Identity()), SGD(0.3))
    assert check
    assert check.approximation_error > 0.1
    assert "Identity()" in str(check)


def test_methods_that_do_not_go_through_the_steps_report_their_distance():
    case = build("mlp")
    check = audit_window(case, Penalty(10.0), SGD(0.1))
    assert check.outcome == "approximates"
    assert not check
    assert check.approximation_error == check.relative_error
    assert "Penalty is " in str(check)
    assert "away from the true derivative" in str(check)


def audit_solution(method, solve_steps, lr=0.3):
    """On a quadratic with eigenvalues from 1 to 5: a step contracts by 1 − lr at best."""
    case = Quadratic()
    solver = BilevelSolver(case.problem, SGD(lr), SGD(0.1), method)
    state = solver.init(case.w, case.x)
    options = {"directions": 2, "steps": (1e-2, 1e-4), "solve_steps": solve_steps}
    return check_hypergradient(solver, state, [None], 0, **options)


def test_implicit_is_held_to_the_solved_lower_level():
    check = audit_solution(Implicit(ConjugateGradient(20, 1e-14)), 80)
    assert check
    assert check.relative_error <= 1e-9  # .7^80 is 4e-13; the rest is rounding
    assert check.lower_gradient_error == 0.0
    assert check.approximation_error is None
    assert "steps that solve the lower level" in str(check)
    assert "stationarity" in str(check)


def test_an_implicit_hypergradient_that_is_not_that_of_the_solution_disagrees():
    damped = audit_solution(Implicit(ConjugateGradient(20, 1e-14, damping=0.5)), 80)
    assert damped.outcome == "disagrees"
    assert damped.relative_error > 1e-2
    with pytest.warns(StationarityWarning):
        unsolved = audit_solution(Implicit(ConjugateGradient(20, 1e-14)), 2)
    assert unsolved.outcome == "disagrees"
    with pytest.raises(ValueError, match="OneStep is not the derivative of the solved lower level"):
        audit_solution(OneStep(), 5)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.layers(x)


class _Trusted(dict):
    """Verdicts that are all good: what the routes measure themselves is switched off."""

    def __contains__(self, key):
        return True


def trusted(case):
    case.problem.__dict__["verdicts"] = _Trusted()
    return case


def test_examples_that_influence_each_other_disagree():
    """Batch statistics in a model taken for one of independent examples."""

    class Normalised(Mlp):
        def forward(self, x):
            hidden = self.layers[:2](x)
            return self.layers[2](hidden - sum(hidden) / len(hidden))

    torch.manual_seed(3)
    case = make(Normalised(), vectors)
    check = audit(trusted(case), OneStep(PerExample()))
    assert check.outcome == "disagrees"
    assert check.lower_gradient_error > 1e-3
    assert "examples of a batch influence each other" in str(check)
    assert audit(case, OneStep(Jvp()))


def test_the_batch_in_another_dimension_of_the_same_size_disagrees():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, tokens):
            hidden = self.mix(self.embed(tokens[:, :5]).transpose(0, 1))
            return self.head(torch.tanh(hidden).transpose(0, 1).mean(1))

    torch.manual_seed(3)
    case = make(Transposed(), tokens)
    check = audit(trusted(case), OneStep(PerExample()))
    assert check.outcome == "disagrees"
    assert "leading dimension" in str(check)
    assert audit(case, OneStep(Jvp()))


def test_float32_is_judged_by_its_own_tolerance_and_may_be_inconclusive():
    case = build("mlp")

    def cast(value):
        return value.float() if value.is_floating_point() else value

    case = replace(
        case,
        params=tree.map(cast, case.params),
        upper_params=tree.map(cast, case.upper_params),
        batch=tree.map(cast, case.batch),
        upper_batch=tree.map(cast, case.upper_batch),
    )
    check = audit(case, OneStep(), SGD(0.3))
    assert check
    assert check.tolerance == 2e-2
    tiny = audit(case, OneStep(), SGD(1e-9), tolerance=1e-6)
    assert tiny.outcome == "inconclusive"
    assert not tiny
    assert "use float64" in str(tiny)


def test_a_slope_that_changes_within_the_smallest_step_is_inconclusive():
    """Embedding rows that only the example of weight 0 uses: Adam's step there is ± lr at once."""
    check = audit(build("attention"), OneStep(), AdamW(0.05))
    assert check.outcome == "inconclusive"
    assert "pass smaller steps" in str(check)
    steps = (1e-10, 1e-11, 1e-12)
    finer = audit(build("attention"), OneStep(), AdamW(0.05), steps=steps, tolerance=1e-3)
    assert finer


def test_nan_never_agrees():
    def per_example_loss(lower, batch):
        return functional.linear(batch, lower).squeeze(1), None

    problem = ReweightingProblem(
        per_example_loss,
        lambda upper, batch, features: upper,
        lambda lower, upper, batch: lower.sum() * 0.0 / 0.0,
    )
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1), OneStep(Jvp()))
    state = solver.init(torch.ones(1, 2).double(), torch.ones(3).double())
    assert not check_hypergradient(solver, state, [torch.ones(3, 2).double()], 0)


def test_dropout_drawn_elsewhere_disagrees():
    """A generator that is not replayed makes the passes differ."""
    torch.manual_seed(3)
    module, own = Mlp().double(), torch.Generator().manual_seed(0)
    case = make(Mlp(), vectors)

    def per_example_loss(lower, batch):
        x = batch["inputs"]["x"]
        x = x * torch.bernoulli(torch.full_like(x, 0.5), generator=own)
        logits = functional_call(module, lower, (x,))
        return functional.cross_entropy(logits, batch["labels"], reduction="none"), None

    case = replace(case, problem=replace(case.problem, per_example_loss=per_example_loss))
    check = audit(case, OneStep(Jvp()))
    assert not check
    assert "generator" in str(check)
