"""Private functions of torch do what public ones say they should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import bilevel
from bilevel.autodiff import torch_private
from bilevel.autodiff.torch_private import (
    NAMES,
    TRIED,
    foreach_add,
    foreach_add_,
    foreach_clamp_min_,
    foreach_div,
    foreach_div_,
    foreach_mul,
    foreach_mul_,
    foreach_sqrt,
    function_modes_off,
    fused_adamw_,
    moves_forward,
    overlaps_itself,
    run_backward,
    softmax_tangent,
    transform_is_active,
)

# torch compiles some of its forward-mode formulas with its deprecated compiler.
pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit:DeprecationWarning")


def test_this_release_of_torch_was_tried():
    release = ".".join(torch.__version__.split(".")[:2])
    assert release in TRIED, (
        f"torch {release} is new here: see that {', '.join(NAMES)} still exist and mean what "
        f"{torch_private.__name__} says; if the other tests of this module pass, add it to TRIED"
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_names_exist(name):
    found = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    assert callable(found)


def test_a_tangent_is_seen_through_a_transform_within():
    seen = []

    def loss(lower, upper):
        lower_image, upper_image = torch.tanh(lower), upper * 2
        values = (lower_image, upper_image, torch.ones(3) * 2, lower_image.detach())
        seen.append([moves_forward(value) for value in values])
        return (lower_image * upper_image).sum()

    at, along = torch.ones(3), torch.ones(3)
    torch.func.jvp(lambda lower: loss(lower, at), (at,), (along,))
    for wanted in (0, 1, (0, 1)):
        gradient = torch.func.grad(loss, wanted)
        torch.func.jvp(lambda lower, gradient=gradient: gradient(lower, at), (at,), (along,))
    assert seen == [[True, False, False, False]] * 4
    torch.func.vmap(lambda row: seen.append(moves_forward(row)) or row)(torch.ones(2, 3))
    assert seen[-1] is False
    assert not moves_forward(at)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tangent_of_softmax(dtype):
    """By its formula, and by torch's forward mode; scores of -inf have no part in it."""
    scores, along = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype)
    scores[0, 1, 2:] = -torch.inf
    p, expected = torch.func.jvp(lambda s: torch.softmax(s, -1), (scores,), (along,))
    found = softmax_tangent(p, along)
    torch.testing.assert_close(found, p * (along - (p * along).sum(-1, keepdim=True)))
    torch.testing.assert_close(found, expected)
    assert found[0, 1, 2:].tolist() == [0.0, 0.0, 0.0]


def test_transforms_are_seen_while_they_last():
    seen = []

    def square(x):
        seen.append(transform_is_active())
        return x.square().sum()

    x = torch.ones(3)
    torch.func.grad(square)(x)
    torch.func.jvp(square, (x,), (x,))
    torch.func.vmap(square)(x)
    assert seen == [True, True, True]
    square(x)
    with torch.autograd.forward_ad.dual_level():
        square(torch.autograd.forward_ad.make_dual(x, x))
    torch.autograd.grad(square(x.requires_grad_()), x)
    assert seen[3:] == [False, False, False]


class Calls(TorchFunctionMode):
    """Counts the functions that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_the_backward_pass_gives_the_gradients_of_grad_and_leaves_modes_on():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, b):
            return torch.mul(b, 2)

    x, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    cotangent = torch.randn(3)
    (expected,) = torch.autograd.grad([Twice.apply(x).sin()], [x], [cotangent])
    with Calls() as calls:
        output = Twice.apply(x).sin()
        calls.names.clear()
        found, nothing = run_backward([output], [x, unused], [cotangent])
    assert calls.names == ["mul"]
    assert torch.equal(found, expected)
    assert nothing is None
    (slope,) = run_backward([x.square().sum()], [x], create_graph=True)
    assert torch.equal(slope, 2 * x)
    assert torch.equal(run_backward([slope.sum()], [x])[0], torch.full((3,), 2.0))
    run_backward([x.square().sum()], [x], accumulate=True)
    assert torch.equal(x.grad, 2 * x)


def test_modes_are_off_within():
    with Calls() as calls, function_modes_off():
        torch.ones(2).add(1)
    assert calls.names == []


def test_no_other_module_names_a_private_function():
    private = re.compile(r"torch\._(?!_)\w+|from torch\.\S+ import .*\b_\w+")
    package = Path(bilevel.__file__).parent
    users = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if private.search(path.read_text(encoding="utf-8"))
    }
    assert users == {"autodiff/torch_private.py"}


def test_lists_of_tensors_have_the_values_of_each():
    def draw():
        generator = torch.Generator().manual_seed(0)
        return [torch.rand(size, generator=generator, dtype=torch.float64) for size in (3, 2)]

    one, other = draw(), [leaf + 1.0 for leaf in draw()]
    for found, expected in (
        (
            foreach_add(one, other, alpha=0.5),
            [a + 0.5 * b for a, b in zip(one, other, strict=True)],
        ),
        (foreach_div(one, other), [a / b for a, b in zip(one, other, strict=True)]),
        (foreach_mul(one, torch.tensor(3.0).double()), [3.0 * leaf for leaf in one]),
        (foreach_sqrt(one), [leaf.sqrt() for leaf in one]),
    ):
        assert all(map(torch.equal, found, expected))
    changed = draw()
    foreach_add_(changed, 2.0)
    foreach_mul_(changed, 3.0)
    foreach_mul_(changed, other)
    foreach_clamp_min_(changed, 14.0)
    foreach_div_(changed, other)
    expected = [((a + 2.0) * 3.0 * b).clamp(min=14.0) / b for a, b in zip(one, other, strict=True)]
    for found, value in zip(changed, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-15, atol=0.0)


def test_the_fused_kernel_takes_the_step_of_adamw():
    theta, grad = torch.linspace(-1, 1, 5).double(), torch.linspace(1, 2, 5).double()
    leaf = theta.clone().requires_grad_()
    leaf.grad = grad.clone()
    torch.optim.AdamW([leaf], lr=0.1, weight_decay=0.2, foreach=False).step()
    first, second, count = torch.zeros_like(theta), torch.zeros_like(theta), torch.tensor(1.0)
    fused_adamw_(
        [theta],
        [grad],
        [first],
        [second],
        [],
        [count],
        lr=0.1,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.2,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
    torch.testing.assert_close(theta, leaf.detach(), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(first, 0.1 * grad, rtol=1e-14, atol=0.0)


def test_expanded_tensors_overlap_themselves():
    assert overlaps_itself(torch.ones(1).expand(3))
    assert not overlaps_itself(torch.ones(3, 2).T)
