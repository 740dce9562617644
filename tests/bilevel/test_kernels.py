"""Operations that stand in for those whose derivatives torch gets wrong, or computes slowly."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bilevel import kernels
from bilevel.kernels import differentiable_kernels


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


ROWS, KEYS = 7, 9
HIDDEN = torch.ones(ROWS, KEYS, dtype=torch.bool).tril()
HIDDEN[3] = False  # a query that sees nothing, as padding on the left makes it
ATTENTION = {
    "all": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": HIDDEN},
    "mask of every head": {"attn_mask": torch.stack([HIDDEN, ~HIDDEN])[None]},
    "bias": {
        "attn_mask": torch.linspace(-1.0, 1.0, ROWS * KEYS, dtype=torch.float64).view(ROWS, KEYS)
    },
    "mask of the keys": {"attn_mask": torch.arange(KEYS)[None] < 5},
    "grouped": {"is_causal": True, "enable_gqa": True, "scale": 0.3},
    "dropout": {"is_causal": True, "dropout_p": 0.3},
}


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("keys", [ROWS - 3, ROWS, KEYS])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_in_blocks_is_that_of_the_math_kernel(monkeypatch, name, keys, size):
    """Values, and first and second derivatives, whatever the block; dropout draws the same."""
    monkeypatch.setattr(kernels, "_CPU_SCORES", size * 4 * keys)
    monkeypatch.setattr(kernels, "_LEAST_ROWS", 1)
    options = dict(ATTENTION[name])
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"][..., :keys]
    heads = 1 if name == "grouped" else 2
    inputs = (torch.randn(2, 2, ROWS, 3), torch.randn(2, heads, keys, 3))
    inputs = tuple(one.double() for one in (*inputs, torch.randn(2, heads, keys, 5)))
    along = tuple(torch.randn_like(one) for one in inputs)

    def loss(*inputs):
        torch.manual_seed(1)
        return functional.scaled_dot_product_attention(*inputs, **options).pow(3).sum()

    with sdpa_kernel(SDPBackend.MATH):
        expected = loss(*inputs)
        gradient = torch.func.grad(loss, (0, 1, 2))(*inputs)
        hessian = torch.func.vjp(torch.func.grad(loss, (0, 1, 2)), *inputs)[1](along)
    with differentiable_kernels():
        torch.testing.assert_close(loss(*inputs), expected)
        slope = torch.func.jvp(loss, inputs, along)[1]
        found = torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), inputs, along)[1]
        twice = torch.func.vjp(torch.func.grad(loss, (0, 1, 2)), *inputs)[1](along)
    products = [(one * other).sum() for one, other in zip(gradient, along, strict=True)]
    torch.testing.assert_close(slope, torch.stack(products).sum(), rtol=1e-12, atol=1e-12)
    for one, other, expected in zip(found, twice, hessian, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(other, expected, rtol=1e-11, atol=1e-12)


def test_causal_attention_in_blocks_leaves_out_what_it_would_mask(monkeypatch):
    """Products of 8 blocks of 64 queries: with 1, 2, ... 8 times 64 keys, 36 of 64."""
    monkeypatch.setattr(kernels, "_CPU_SCORES", 0)
    q = torch.randn(1, 2, 512, 8)

    def flops(**options):
        with FlopCounterMode(display=False) as counter, differentiable_kernels():
            functional.scaled_dot_product_attention(q, q, q, **options)
        return counter.get_total_flops()

    assert flops() == 2 * 2 * 2 * 512 * 512 * 8
    assert flops(is_causal=True) * 64 == flops() * 36


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
