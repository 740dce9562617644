"""Products of dual numbers against torch's own forward-mode derivative."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bilevel.autodiff.kernels import differentiable_kernels

MATRIX, ROW = torch.randn(3, 4), torch.randn(4)
FACTORS = {
    "a number": 2.5,
    "an integer": 3,
    "a mask": torch.tensor([True, False, True, True]),
    "the same shape": torch.randn(3, 4),
    "a row": torch.randn(4),
    "a wider shape": torch.randn(2, 3, 4),
    "another precision": torch.randn(3, 4, dtype=torch.float64),
    "16 bits": torch.randn(3, 4, dtype=torch.bfloat16),
    "a scalar of another precision": torch.tensor(0.3, dtype=torch.float64),
}
WAYS = {
    "operator": lambda a, b: a * b,
    "function": torch.mul,
    "method": lambda a, b: a.mul(b),
    "reflected": lambda a, b: b * a,
    "in place": lambda a, b: torch.empty_like(a * b).copy_(a).mul_(b),
    "out": lambda a, b: torch.mul(a, other=b),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", FACTORS)
def test_one_factor_moves(factor, way):
    """Values, tangents and precision are torch's, for constants of every kind."""
    other = FACTORS[factor]

    def function(moving):
        return WAYS[way](moving, other)

    along = torch.randn(3, 4)
    expected = torch.func.jvp(function, (MATRIX,), (along,))
    with differentiable_kernels():
        found = torch.func.jvp(function, (MATRIX,), (along,))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(3, 4), (4,), (3, 1), ()])
def test_both_factors_move(shape, way):
    given, along = ((torch.randn(3, 4), torch.randn(shape)) for _ in range(2))
    expected = torch.func.jvp(WAYS[way], given, along)
    with differentiable_kernels():
        found = torch.func.jvp(WAYS[way], given, along)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_derivatives_nest():
    """d/dx of (x² c)' = 2 x c x', forward and backward, and through `vmap` on either side."""
    x, c, along = (torch.randn(3, dtype=torch.float64) for _ in range(3))

    def slope(x):
        return torch.func.jvp(lambda x: (x * x * c).sum(), (x,), (along,))[1]

    def vmap_inside(x):
        def mapped(x):
            return torch.func.vmap(lambda x, c: x * x * c)(x, c).sum()

        return torch.func.jvp(mapped, (x,), (along,))[1]

    def vmap_outside(x):
        def one(x, c, along):
            return torch.func.jvp(lambda x: x * x * c, (x,), (along,))[1]

        return torch.func.vmap(one)(x, c, along).sum()

    with differentiable_kernels():
        for function in (slope, vmap_inside, vmap_outside):
            torch.testing.assert_close(function(x), (2 * x * c * along).sum())
            torch.testing.assert_close(torch.func.grad(function)(x), 2 * c * along)
            twice = torch.func.jvp(function, (x,), (x,))[1]
            torch.testing.assert_close(twice, (2 * c * along * x).sum())


def test_objects_that_know_how_to_be_multiplied():
    class Doubling:
        def __rmul__(self, other):
            return other + other

    with differentiable_kernels():
        found = torch.func.jvp(lambda x: x * Doubling(), (MATRIX,), (MATRIX,))
    torch.testing.assert_close(found, (2 * MATRIX, 2 * MATRIX))


def test_a_constant_factor_takes_two_products():
    """torch makes a third one of zeros, and an addition, by way of Python."""

    def operations():
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            torch.func.jvp(lambda x: x * ROW, (MATRIX,), (MATRIX,))
        return [event.key for event in recorded.events() if event.key.startswith("prims::")]

    assert operations()  # else what is done by hand here is no longer worth it
    with differentiable_kernels():
        assert not operations()
