"""What autograd treats as a constant is one on every route."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bilevel import (
    SGD,
    Auto,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    Jvp,
    OneStep,
    PerExample,
    Reverse,
    ReweightingProblem,
    Unrolled,
)
from bilevel.autodiff.finite_difference import central_difference
from bilevel.autodiff.stop_gradients import StopGradients, equal, watched
from bilevel.lower.hessian_product import hessian_product
from bilevel.lower.lower_pass import lower_pass
from tests.bilevel.comparing import relative

F64 = torch.float64
LR = 0.3


class Doubled(torch.autograd.Function):
    """With all derivatives that torch can have; for use while grad mode is off."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent


def without_grad(function):
    @torch.no_grad()
    def run(z):
        return function(z)

    return run


def switched_off(z):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    y = torch.tanh(2 * z)
    torch.set_grad_enabled(before)
    return y


def in_inference_mode(z):
    with torch.inference_mode():
        y = torch.tanh(2 * z)
    return y.clone()


def on_again(z):
    with torch.no_grad():
        y = torch.tanh(2 * z)
        with torch.enable_grad():
            return y + z.square()


def moving_average(z):
    average = torch.ones_like(z)
    with torch.no_grad():
        average.mul_(0.9).add_(z, alpha=0.1)
    return average


def entry_by_entry(z):
    filled = torch.zeros_like(z)
    with torch.no_grad():
        filled[:, 0] = z[:, 1]
        torch.mul(z[:, :1], 2, out=filled[:, 1:])
    return filled


def by_foreach(z):
    averages = [torch.ones_like(z)]
    with torch.no_grad():
        torch._foreach_lerp_(averages, [z], 0.5)
    return averages[0]


def detached_in_place(z):
    y = torch.tanh(2 * z)
    y.detach_()
    return y


def scaled_by_a_number(z):
    return z / z.norm(dim=0).sum().item() + float(z.detach().sum())


def by_a_list(z):
    return torch.tensor(z.tolist(), dtype=z.dtype)


def gradient_norm(z):
    (slope,) = torch.autograd.grad(z.pow(3).sum(), z)
    return slope


def straight_through(z):
    return z + (torch.round(4 * z) / 4 - z).detach()


def pseudo_labels(z):
    with torch.no_grad():
        return functional.one_hot(z.argmax(1), z.shape[1]).to(z.dtype) - z.max(1, keepdim=True)[0]


STOPS = {
    "no_grad": without_grad(lambda z: torch.tanh(2 * z)),
    "a view": without_grad(lambda z: z.view(-1).view(z.shape)),
    "several views": without_grad(lambda z: torch.stack(z.unbind())),
    "itself": without_grad(lambda z: z.contiguous()),
    "two results": without_grad(lambda z: torch.max(z, 0).values.expand(z.shape)),
    "a custom function": without_grad(Doubled.apply),
    "set_grad_enabled": switched_off,
    "inference mode": in_inference_mode,
    "enabled again": on_again,
    "detach": lambda z: torch.tanh(2 * z).detach(),
    "data": lambda z: torch.tanh(2 * z).data,
    "detach_": detached_in_place,
    "new_tensor": lambda z: z.new_tensor(z.tolist()),
    "item": scaled_by_a_number,
    "tolist": by_a_list,
    "moving average": moving_average,
    "by entries": entry_by_entry,
    "foreach": by_foreach,
    "straight-through": straight_through,
    "pseudo-labels": pseudo_labels,
}


def problems(stop):
    """A scalar and a per-example loss with a constant in it, and the scalar loss of both."""

    def losses(lower, batch):
        z = torch.tanh(batch @ lower["w"])
        y = stop(z)
        return ((z - y).square() + z * y.tanh()).sum(1)

    def upper(lower, upper, batch):
        z = torch.tanh(batch @ lower["w"])
        return (z * stop(z)).sum()

    def general(lower, upper, batch):
        return (
            torch.exp(upper["a"]).sum() * torch.sigmoid(upper["r"]) * losses(lower, batch)
        ).mean()

    per_example = ReweightingProblem(
        lambda lower, batch: (losses(lower, batch), None),
        lambda upper, batch, features: torch.exp(upper["a"]).sum() * torch.sigmoid(upper["r"]),
        upper,
    )
    return BilevelProblem(general, upper), per_example, general, upper


def data():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=F64, generator=generator)  # noqa: E731
    return {"w": draw(3, 2)}, {"a": draw(2), "r": draw(5)}, draw(5, 3), draw(4, 3)


def reference(general, upper_loss, steps):
    """Double backward through steps of SGD that are written out here."""
    lower, upper, batch, upper_batch = data()
    upper = {name: leaf.requires_grad_() for name, leaf in upper.items()}
    w = lower["w"].requires_grad_()
    for _ in range(steps):
        (slope,) = torch.autograd.grad(general({"w": w}, upper, batch), w, create_graph=True)
        w = w - LR * slope
    return dict(
        zip(
            upper,
            torch.autograd.grad(upper_loss({"w": w}, upper, upper_batch), upper.values()),
            strict=True,
        )
    )


def found(problem, hypergradient, steps):
    lower, upper, batch, upper_batch = data()
    solver = BilevelSolver(problem, SGD(LR), SGD(1.0), hypergradient, unroll_steps=steps)
    state = solver.init(lower, upper)
    new, infos = solver.window(state, [[batch]] * steps, upper_batch)
    assert infos[-1].notes == ()
    return {name: upper[name] - new.upper_params[name] for name in upper}


@pytest.mark.parametrize("name", STOPS)
def test_a_constant_of_the_loss_is_one_on_every_route(name):
    general, per_example, loss, upper = problems(STOPS[name])
    for steps, methods in (
        (1, [OneStep(route) for route in (Auto(), Jvp(), Reverse(), CentralDifference())]),
        (2, [Unrolled(), *(Unrolled(product=p) for p in (Jvp(), Reverse(), CentralDifference()))]),
    ):
        expected = reference(loss, upper, steps)
        for method in methods:
            bound = 1e-7 if "CentralDifference" in repr(method) else 1e-12
            assert relative(found(general, method, steps), expected) <= bound, method
            assert relative(found(per_example, method, steps), expected) <= bound, method
    assert (
        relative(found(per_example, OneStep(PerExample()), 1), reference(loss, upper, 1)) <= 1e-12
    )


@pytest.mark.parametrize("route", [Reverse(), Jvp(), CentralDifference()], ids=str)
@pytest.mark.parametrize("name", STOPS)
def test_hessian_products_leave_constants_out(name, route):
    problem, _, loss, _ = problems(STOPS[name])
    lower, upper, batch, _ = data()
    passed = lower_pass(problem, route, lower, upper, [batch])
    along = {"w": torch.randn(3, 2, dtype=F64)}
    product = hessian_product(problem, route, passed, lower, upper)(along)
    w = lower["w"].requires_grad_()
    (slope,) = torch.autograd.grad(loss({"w": w}, upper, batch), w, create_graph=True)
    (expected,) = torch.autograd.grad(slope, w, along["w"])
    # Where all that is left is a quadratic, differences are right to rounding.
    assert relative(product, {"w": expected}) <= (1e-7 if route == CentralDifference() else 1e-12)


def difference(loss, w, calls=None):
    """The slope of a loss along (1, 2, …), and how often it was called."""
    calls = [] if calls is None else calls

    def function(shifted, _, watch):
        calls.append(shifted)
        leaf = shifted.requires_grad_()
        with torch.enable_grad(), watch:
            value = loss(leaf)
        return (value.detach(),)

    along = torch.arange(1.0, 1 + w.numel(), dtype=w.dtype).reshape(w.shape)
    (slope,) = central_difference(CentralDifference(), function, w, along, None, (w.new_zeros(()),))
    leaf = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert float(slope) == pytest.approx(float((gradient * along).sum()), rel=1e-7)
    return len(calls)


def test_constants_cost_passes_only_where_they_depend_on_the_parameters():
    w, frozen = torch.randn(4, dtype=F64), torch.randn(4, dtype=F64)

    def teacher(w):
        with torch.no_grad():
            target = torch.tanh(frozen * 3).detach()
        return ((w - target) ** 2 * torch.ones_like(w)).sum()

    assert difference(teacher, w) == 2
    assert difference(lambda w: ((w**2).detach() * w).sum(), w) == 5


def hardest(w):
    return torch.where(w >= w.detach().topk(2).values[-1], w**2, 0 * w).sum()


@pytest.mark.parametrize(
    "loss",
    [
        hardest,
        lambda w: (w.exp() * (w > w.detach() - 1e-9) * (w >= w.detach())).sum(),
        lambda w: w.exp()[w.argmax()],
        lambda w: (functional.one_hot(w.argmin(), 4) * w.exp()).sum(),
        lambda w: w.exp()[(w >= w.detach()).nonzero()[:, 0]].sum(),
    ],
)
def test_masks_and_indices_of_the_parameters_are_constants_at_a_tie(loss):
    w = torch.tensor([0.5, 1.0, 0.5, 1.0], dtype=F64)
    assert difference(loss, w) == 5


def test_what_is_watched_follows_from_the_parameters_at_once():
    """A frozen teacher is not looked at, and of a chain of constants only the first is."""
    w, frozen = torch.randn(4, dtype=F64, requires_grad=True), torch.randn(4, dtype=F64)
    with StopGradients() as watch, torch.no_grad():
        (frozen * 3).exp().tanh()
        (w.exp() + 1).tanh().sum().item()
    assert len(watch.constants) == 1
    assert torch.equal(watch.constants[0], w.detach().exp())
    assert watch.dtypes == set()


def test_constants_held_come_back_wherever_the_loss_is_run():
    problem = ReweightingProblem(
        lambda lower, batch: ((losses := (batch * lower) ** 2), losses),
        lambda upper, batch, features: upper * features,
        lambda lower, upper, batch: (lower.detach() * lower * upper).sum(),
    )
    here, there, upper = (torch.randn(3, dtype=F64) for _ in range(3))
    batch = torch.ones(3, dtype=F64)
    watch = StopGradients()
    first = watched(problem, watch)
    first.lower_loss(here.requires_grad_(), upper, batch)
    first.upper_loss(here, upper, batch)
    assert equal(watch.constants, [here.detach() ** 2, here.detach()])
    held = watched(problem, StopGradients(watch.constants))
    loss = held.lower_loss(there.requires_grad_(), upper, batch)
    torch.testing.assert_close(loss, (upper * here**2 * there**2).mean())
    torch.testing.assert_close(held.upper_loss(there, upper, batch), (here * there * upper).sum())


def clamped_data(w):
    y = w * 1
    y.data.clamp_(-0.1, 0.1)
    return (y**3).sum()


def clamped_without_grad(w):
    y = w * 1
    with torch.no_grad():
        y.clamp_(-0.1, 0.1)
    return (y**3).sum()


def data_replaced(w):
    y = w * 1
    y.data = y.data.clamp(-0.1, 0.1)
    return (y**3).sum()


@pytest.mark.parametrize("loss", [clamped_data, clamped_without_grad, data_replaced])
def test_differences_refuse_what_is_written_behind_autograd(loss):
    with pytest.raises(RuntimeError, match=r"where autograd does not see it.*Reverse\(\)"):
        difference(loss, torch.randn(4, dtype=F64))


def test_differences_refuse_to_cross_a_branch_with_other_constants():
    calls = []

    def loss(w):
        y = w.detach().exp() if len(calls) == 3 else w[:2].detach()
        return (w**2).sum() * y.sum()

    with pytest.raises(RuntimeError, match="other constants"):
        difference(loss, torch.randn(4, dtype=F64), calls=calls)


class Sign(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_differences_say_that_a_custom_function_may_have_another_backward():
    w = torch.randn(4, dtype=F64)
    with pytest.warns(UserWarning, match=r"custom autograd\.Function.*Reverse\(\)"):
        assert difference(lambda w: (Doubled.apply(w) ** 2).sum(), w) == 2
    with (
        pytest.warns(UserWarning, match=r"within a transform of torch\.func"),
        pytest.raises(AssertionError),
    ):
        difference(lambda w: torch.func.vmap(lambda x: x * x.detach())(w).sum(), w)


def test_a_checkpoint_is_no_custom_function():
    w = torch.randn(4, dtype=F64)
    loss = lambda w: checkpoint(lambda x: (x.tanh() * x).sum(), w, use_reentrant=False)  # noqa: E731
    assert difference(loss, w) == 2


def rms_norm(dtype):
    """As in transformers: in less precision than its input, and back."""

    def loss(w):
        x = w.to(dtype)
        return (w * (x * torch.rsqrt((x * x).mean() + 1e-6)).to(w.dtype)).sum()

    return loss


@pytest.mark.parametrize(
    ("outside", "inside", "bound"),
    [(F64, torch.float32, 2e-3), (torch.float32, torch.bfloat16, 0.1)],
    ids=str,
)
def test_the_step_is_that_of_the_least_precise_number_within_the_loss(outside, inside, bound):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, dtype=F64, generator=generator)
    along = torch.randn(64, dtype=F64, generator=generator)
    exact = torch.func.jvp(rms_norm(F64), (w,), (along,))[1]
    loss, calls = rms_norm(inside), []

    def function(shifted, _, watch):
        calls.append(shifted)
        with torch.enable_grad(), watch:
            value = loss(shifted.requires_grad_())
        return (value.detach(),)

    like = (torch.zeros((), dtype=outside),)
    route = CentralDifference(widen=False)
    (slope,) = central_difference(route, function, w.to(outside), along.to(outside), None, like)
    assert abs(float(slope / exact) - 1) <= bound
    assert len(calls) == 3
    fixed = CentralDifference(0.1 * torch.finfo(outside).eps ** (1 / 3), widen=False)
    (slope,) = central_difference(fixed, function, w.to(outside), along.to(outside), None, like)
    assert abs(float(slope / exact) - 1) > bound  # what it was
    assert len(calls) == 5
