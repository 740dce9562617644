"""Dual numbers taken apart and put together, at every depth of nested derivatives."""

from __future__ import annotations

import pytest
import torch

from bilevel.autodiff.dual_numbers import joined, parts

# torch compiles some of its forward-mode formulas with its deprecated compiler.
pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit:DeprecationWarning")


def square(x):
    """x², with the tangent 2 x x' by hand."""
    duals = parts(x)
    if duals is None:
        return x * x
    ((value, tangent),) = duals
    return joined(value * value, 2.0 * value * tangent)


def test_what_does_not_move_has_no_tangent():
    x, y, along = torch.randn(3), torch.randn(3), torch.randn(3)
    found = []

    def function(x):
        found.append(parts(x, y, 2.0))
        return x

    function(x)
    torch.func.jvp(function, (x,), (along,))
    assert found[0] is None
    moving, still, number = found[1]
    assert moving.tangent.tolist() == along.tolist()
    assert still.tangent is None
    assert still.value.tolist() == y.tolist()
    assert number == (2.0, None)


def test_derivatives_nest():
    """d/dx Σ (x²)' = 2 x', forward and backward, and through `vmap` on either side."""
    x, along = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def slope(x):
        return torch.func.jvp(lambda x: square(x).sum(), (x,), (along,))[1]

    def vmap_inside(x):
        return torch.func.jvp(lambda x: torch.func.vmap(square)(x).sum(), (x,), (along,))[1]

    def vmap_outside(x):
        def one(x, along):
            return torch.func.jvp(square, (x,), (along,))[1]

        return torch.func.vmap(one)(x, along).sum()

    for function in (slope, vmap_inside, vmap_outside):
        torch.testing.assert_close(function(x), (2 * x * along).sum())
        torch.testing.assert_close(torch.func.grad(function)(x), 2 * along)
        twice = torch.func.jvp(function, (x,), (x,))[1]
        torch.testing.assert_close(twice, (2 * along * x).sum())
