"""Losses that forward mode has no second derivative of, written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bilevel import SGD, BilevelProblem, BilevelSolver, Implicit, Jvp, OneStep, Reverse, Unrolled
from bilevel.autodiff import equivalents
from bilevel.autodiff.kernels import (
    differentiable_kernels,
    forward_mode_loss,
    kernels_for_transforms,
)
from tests.bilevel.comparing import relative

F64 = torch.float64
LEGACY = [
    {"reduction": "none"},
    {"reduction": "sum"},
    {"reduction": "mean"},
    {"size_average": False},
    {"size_average": True},
    {"reduce": False},
    {"reduce": True, "size_average": False},
]
LOSSES = ["mse_loss", "huber_loss", "soft_margin_loss"]


def arguments(name):
    x, y = torch.randn(2, 4, 3, dtype=F64)
    return x, y.sign() if name == "soft_margin_loss" else y


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_values_are_those_of_the_originals(name):
    x, y = arguments(name)
    options = LEGACY[:3] if name == "huber_loss" else LEGACY
    if name == "huber_loss":
        options = [{**one, "delta": 0.3} for one in options]
        options += [{**one, "weight": x.abs()} for one in options]
    if name == "mse_loss":
        options = [*options, *({**one, "weight": x.abs()} for one in options[:3])]
    for one in options:
        expected = getattr(functional, name)(x, y, **one)
        torch.testing.assert_close(getattr(equivalents, name)(x, y, **one), expected)
    with pytest.raises(ValueError, match="average is not a valid value for reduction"):
        getattr(equivalents, name)(x, y, reduction="average")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("swapped", [False, True])
def test_forward_over_reverse_is_double_backward(name, reduction, swapped):
    """Also where the prediction is the second argument, if the loss has a gradient there."""
    swapped &= name != "soft_margin_loss"
    x, y = arguments(name)
    along = torch.randn_like(x)

    def loss(x):
        pair = (y, x) if swapped else (x, y)
        return (getattr(functional, name)(*pair, reduction=reduction) * x.exp()).sum()

    def written_out(x):
        with forward_mode_loss():
            return loss(x)

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(slope, leaf, along)
    with torch.no_grad(), kernels_for_transforms():
        found = torch.func.jvp(torch.func.grad(written_out), (x,), (along,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_ridge_regression_by_its_closed_form():
    """Of min ‖X w − y‖² / n + Σ e^λ w²: dw/dλ = −A⁻¹ diag(e^λ w) with A = XᵀX / n + diag(e^λ)."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 4, dtype=F64), torch.randn(20, dtype=F64)
    x_upper, y_upper = torch.randn(20, 4, dtype=F64), torch.randn(20, dtype=F64)
    decay = torch.randn(4, dtype=F64)
    matrix = x.T @ x / 20 + torch.diag(decay.exp())
    w = torch.linalg.solve(matrix, x.T @ y / 20)
    v = 2 * x_upper.T @ (x_upper @ w - y_upper) / 20
    expected = -(decay.exp() * w) * torch.linalg.solve(matrix, v)

    def lower(theta, phi, batch):
        ridge = (phi["decay"].exp() * theta["w"] ** 2).sum()
        return functional.mse_loss(x @ theta["w"], y) + ridge

    problem = BilevelProblem(
        lower, lambda theta, phi, batch: functional.mse_loss(x_upper @ theta["w"], y_upper)
    )
    for product in (Jvp(), Reverse()):
        solver = BilevelSolver(problem, SGD(0.0), SGD(1.0), Implicit(product=product))
        state = solver.init({"w": w}, {"decay": decay})
        new, _ = solver.step(state, [None], 0)
        assert relative(decay - new.upper_params["decay"], expected) <= 1e-9


@pytest.mark.parametrize("method", [OneStep(), OneStep(Jvp()), Unrolled(), Unrolled(product=Jvp())])
def test_a_learned_initial_point_under_squared_errors(method):
    """w = δ + φ: two steps of gradient descent on a quadratic, written out."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, dtype=F64)

    def loss(theta, phi, batch):
        return functional.mse_loss(x @ (theta["delta"] + phi["start"]), y)

    steps = 1 if isinstance(method, OneStep) else 2
    solver = BilevelSolver(
        BilevelProblem(loss, loss), SGD(0.1), SGD(1.0), method, unroll_steps=steps
    )
    start = torch.randn(3, dtype=F64)
    state = solver.init({"delta": torch.zeros(3, dtype=F64)}, {"start": start})
    new, _ = solver.window(state, [[None]] * steps, 0)
    hessian = 2 * x.T @ x / 6
    contraction = torch.linalg.matrix_power(torch.eye(3, dtype=F64) - 0.1 * hessian, steps)
    least = torch.linalg.solve(hessian, 2 * x.T @ y / 6)
    reached = least + contraction @ (start - least)
    expected = contraction @ (hessian @ (reached - least))
    assert relative(start - new.upper_params["start"], expected) <= 1e-12


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "permuted": lambda x: x.permute(2, 0, 1),
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(3, 4, 2),
}


@pytest.mark.parametrize("name", ["dropout", "alpha_dropout"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_drops_the_same_within_transforms(name, inplace, layout):
    """torch's own, as of 2.13, drops others from a transposed tensor: see the third case."""

    def dropped(x):
        torch.manual_seed(0)
        rows = LAYOUTS[layout](x)
        rows = rows.clone(memory_format=torch.preserve_format) if inplace else rows
        return getattr(functional, name)(rows, 0.4, training=True, inplace=inplace)

    def within(x):
        with forward_mode_loss():
            return dropped(x)

    x = torch.rand(3, 4, 2, dtype=F64)
    with torch.no_grad(), kernels_for_transforms():
        found, tangent = torch.func.jvp(within, (x,), (torch.ones_like(x),))
    expected = dropped(x)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)
    ahead, behind = dropped(x + 0.5), dropped(x - 0.5)
    torch.testing.assert_close(tangent, ahead - behind, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_at_its_ends_is_torch_s(p):
    x = torch.rand(3, 4, dtype=F64)
    for name in ("dropout", "alpha_dropout"):
        for training in (False, True):
            found = getattr(equivalents, name)(x, p, training)
            assert torch.equal(found, getattr(functional, name)(x, p, training))


def test_the_padding_row_of_an_embedding_has_no_derivative():
    """Tied weights move it all the same; autograd holds it."""
    tokens = torch.tensor([[0, 2, 1], [3, 2, 2]])
    for padding in (2, -2):
        table, along = torch.randn(2, 4, 3, dtype=F64)

        def loss(table, padding=padding):
            rows = functional.embedding(tokens, table, padding)
            return ((rows @ table.T) ** 3).sum()

        def within(table):
            with forward_mode_loss():
                return loss(table)

        leaf = table.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (expected,) = torch.autograd.grad(slope, leaf, along)
        with torch.no_grad(), kernels_for_transforms():
            tangent = torch.func.jvp(within, (table,), (along,))[1]
            found = torch.func.jvp(torch.func.grad(within), (table,), (along,))[1]
        torch.testing.assert_close(tangent, (slope * along).sum())
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_weight_norm_has_all_of_its_second_derivative(dim):
    """By its definition; the double backward of torch's own leaves out that ‖v‖ depends on v."""
    v, along, slope = torch.randn(3, 4, 3, 2, dtype=F64)
    others = [one for one in range(3) if dim == -1 or one != dim % 3]
    g = torch.rand([1 if one in others else size for one, size in enumerate(v.shape)], dtype=F64)
    g = g.sum() if dim == -1 else g

    def by_definition(v):
        return (torch.sin(g * v / v.square().sum(others, keepdim=dim != -1).sqrt()) * slope).sum()

    def by_torch(v):
        return (torch.sin(torch._weight_norm(v, g, dim)) * slope).sum()

    def within(v):
        with forward_mode_loss():
            return by_torch(v)

    torch.testing.assert_close(by_torch(v), by_definition(v))
    expected = torch.autograd.functional.hvp(by_definition, v, along)[1]
    with torch.no_grad(), kernels_for_transforms():
        found = torch.func.jvp(torch.func.grad(within), (v,), (along,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with differentiable_kernels():
        found = torch.autograd.functional.hvp(by_torch, v, along)[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_hooks_and_scaled_gradients_are_named_instead_of_ignored():
    x, tokens = torch.randn(3, 2, dtype=F64), torch.tensor([0, 0, 1])

    def reversed_gradient(x):
        y = x * 2
        y.register_hook(lambda grad: -grad)
        return y.sum()

    def reversed_if_wanted(x):
        y = x * 2
        if y.requires_grad:  # as in the pass that is differentiated
            y.register_hook(lambda grad: -grad)
        return y.sum()

    def scaled(x):
        return functional.embedding(tokens, x, scale_grad_by_freq=True).sum()

    for loss, message in (
        *((reversed_gradient, "register_hook"), (reversed_if_wanted, "register_hook")),
        (scaled, "leave the option out"),
    ):

        def within(x, loss=loss):
            with forward_mode_loss():
                return loss(x)

        with pytest.raises((RuntimeError, NotImplementedError), match=message):  # noqa: SIM117
            with torch.no_grad(), kernels_for_transforms():
                torch.func.jvp(within, (x,), (x,))
