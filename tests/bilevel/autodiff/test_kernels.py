"""Operations that stand in for those whose derivatives torch gets wrong."""

from __future__ import annotations

import pytest
import torch

from bilevel.autodiff.kernels import differentiable_kernels


def scatter(kind, values, mask, source):
    if kind == "method":
        return values.masked_scatter(mask, source)
    if kind == "function":
        return torch.masked_scatter(values, mask, source)
    return (values + 0.0).masked_scatter_(mask, source)


@pytest.mark.parametrize("kind", ["method", "function", "in place"])
@pytest.mark.parametrize(
    ("mask", "entries"),
    [
        ([[1, 0, 1], [0, 1, 0]], 3),
        ([[1, 0, 1], [0, 1, 0]], 6),  # more than are used, and as many as the mask has entries
        ([[1], [0]], 3),
        ([[0, 0, 0], [0, 0, 0]], 2),
        ([[0, 0, 0], [0, 0, 0]], 0),
        ([[1, 1, 1], [1, 1, 1]], 6),
    ],
)
def test_masked_scatter(kind, mask, entries):
    values = torch.randn(2, 3, dtype=torch.float64)
    mask, source = torch.tensor(mask).bool(), torch.randn(entries, dtype=torch.float64)
    expected = scatter(kind, values, mask, source)
    with differentiable_kernels():
        assert torch.equal(scatter(kind, values, mask, source), expected)

    def loss(values, source):
        return (scatter(kind, values.sin(), mask, source.sin()) * values).pow(3).sum()

    along = torch.randn_like(values), torch.randn_like(source)
    hessian = torch.autograd.functional.vhp(loss, (values, source), along)[1]
    with differentiable_kernels():
        found = torch.func.jvp(torch.func.grad(loss, (0, 1)), (values, source), along)[1]
    for one, other in zip(found, hessian, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_missing_derivative_names_the_way_out():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    with pytest.raises(RuntimeError, match=r"CentralDifference\(\)"), differentiable_kernels():
        torch.func.jvp(Opaque.apply, (torch.ones(2),), (torch.ones(2),))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), differentiable_kernels():
        torch.ones(2, 3) @ torch.ones(2, 3)
