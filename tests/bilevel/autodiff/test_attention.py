"""Attention in blocks, and the derivatives of it that are written by hand, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bilevel.autodiff import attention
from bilevel.autodiff.kernels import differentiable_kernels

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
    monkeypatch.setattr(attention, "_CPU_SCORES", size * 4 * keys)
    monkeypatch.setattr(attention, "_LEAST_ROWS", 1)
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
    monkeypatch.setattr(attention, "_CPU_SCORES", 0)
    q = torch.randn(1, 2, 512, 8)

    def flops(**options):
        with FlopCounterMode(display=False) as counter, differentiable_kernels():
            functional.scaled_dot_product_attention(q, q, q, **options)
        return counter.get_total_flops()

    assert flops() == 2 * 2 * 2 * 512 * 512 * 8
    assert flops(is_causal=True) * 64 == flops() * 36


def inputs_of(heads=2, keys=KEYS, dtype=torch.float64):
    shapes = [(2, 2, ROWS, 3), (2, heads, keys, 3), (2, heads, keys, 5)]
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def both(function, inputs, along):
    """Values and tangents with torch's MATH kernel, and with ours."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(function, inputs, along)
    with torch.no_grad(), differentiable_kernels():
        return expected, torch.func.jvp(function, inputs, along)


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_tangents_of_some_of_the_inputs(moving):
    """As of adapters on the queries alone."""
    given = inputs_of()

    def function(*some):
        whole = list(given)
        for place, one in zip(moving, some, strict=True):
            whole[place] = one
        return functional.scaled_dot_product_attention(*whole, is_causal=True)

    some = tuple(given[place] for place in moving)
    expected, found = both(function, some, tuple(torch.randn_like(one) for one in some))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_no_queries_at_all():
    query, key, value = inputs_of()
    given = (query[:, :, :0], key, value)
    along = tuple(torch.randn_like(one) for one in given)

    def function(*given):
        return functional.scaled_dot_product_attention(*given)

    for found in both(function, given, along):
        assert [one.shape for one in found] == [(2, 2, 0, 5)] * 2


def test_a_mask_that_moves():
    """A learned bias: torch's own derivatives then."""
    given = (*inputs_of(), torch.randn(2, ROWS, KEYS, dtype=torch.float64))

    def function(*given):
        return functional.scaled_dot_product_attention(*given)

    expected, found = both(function, given, tuple(torch.randn_like(one) for one in given))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tangents_in_16_bits_are_rounded_once(dtype):
    given = inputs_of(dtype=dtype)
    along = tuple(torch.randn_like(one) for one in given)

    def function(*given):
        return functional.scaled_dot_product_attention(*given, is_causal=True)

    _, found = both(function, given, along)
    wide = [tuple(one.double() for one in some) for some in (given, along)]
    exact, _ = both(function, *wide)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        half_an_ulp = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(one.double(), other, rtol=1.01 * half_an_ulp, atol=1e-5)


def test_large_scores_lose_no_digits_of_the_tangent():
    """Tangents with a part common to all keys, which the softmax does not see."""
    query, key, value = inputs_of(dtype=torch.float32)
    along = (query.clone(), torch.full_like(key, 1e3), torch.zeros_like(value))

    def function(*given):
        return functional.scaled_dot_product_attention(*given)

    exact, _ = both(
        function,
        tuple(one.double() for one in (query, key, value)),
        tuple(one.double() for one in along),
    )
    theirs, ours = both(function, (query, key, value), along)
    error = (ours[1] - exact[1]).norm() / exact[1].norm()
    assert error <= 2.0 * (theirs[1] - exact[1]).norm() / exact[1].norm()


def test_derivatives_nest():
    """Forward and backward through forward, with `vmap` inside and outside."""
    given = inputs_of()
    along = tuple(torch.randn_like(one) for one in given)

    def slope(attend, given, along):
        return torch.func.jvp(lambda *given: attend(*given).pow(3).sum(), given, along)[1]

    def plain(*given):
        return slope(functional.scaled_dot_product_attention, given, along)

    def vmap_inside(*given):
        return slope(torch.func.vmap(functional.scaled_dot_product_attention), given, along)

    def vmap_outside(*given):
        one_by_one = torch.func.vmap(
            lambda *both: slope(functional.scaled_dot_product_attention, both[:3], both[3:])
        )
        return one_by_one(*given, *along).sum()

    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.func.grad(plain, (0, 1, 2))(*given)
        second = torch.func.jvp(plain, given, along)
    with differentiable_kernels():
        for function in (plain, vmap_inside, vmap_outside):
            found = torch.func.grad(function, (0, 1, 2))(*given)
            torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-11)
            found = torch.func.jvp(function, given, along)
            torch.testing.assert_close(found, second, rtol=1e-11, atol=1e-11)
