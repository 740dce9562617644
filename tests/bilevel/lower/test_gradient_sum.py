"""Sums of gradients over micro-batches, in place and leaf by leaf."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from bilevel import Dot, ReweightingProblem, tree
from bilevel.lower.gradient_sum import GradientStream, GradientSum
from bilevel.lower.lower_pass import lower_pass
from tests.bilevel.comparing import same_bits
from tests.oracles import random_like
from tests.peak_bytes import peak_bytes

PARAMS = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64), "idle": None, "b": torch.zeros(1)}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("factor", [2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)])
def test_sums_are_in_place_and_leave_the_gradients_alone(factor, kept):
    total = GradientSum(PARAMS, widen=False)
    first = {"w": torch.tensor([1.0, 3.0], dtype=torch.float64), "idle": None, "b": None}
    second = {"w": torch.tensor([5.0, 7.0], dtype=torch.float64), "idle": None, "b": torch.ones(1)}
    total.add(factor, first, kept=kept)
    total.add(factor, second, kept=kept)
    found = total.mean(4.0)
    assert found["w"].tolist() == [3.0, 5.0]
    assert found["b"].tolist() == [0.5]
    assert found["idle"] is None
    assert first["w"].tolist() == [1.0, 3.0]
    assert second["w"].tolist() == [5.0, 7.0]
    assert tree.leaves(total.mean(1.0)) == []


def test_many_gradients_of_16_bits_are_summed_in_float32():
    """In bfloat16 the sum would stop at 256, where 1 is half a unit in the last place."""
    params = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    for widen, wanted in ((True, 1.0), (False, 0.25)):
        total = GradientSum(params, widen=widen)
        for _ in range(1024):
            total.add(1.0, {"w": torch.ones(1, dtype=torch.bfloat16)})
        found = total.mean(1024.0)["w"]
        assert found.dtype is torch.bfloat16
        assert found.item() == wanted


def test_a_stream_finds_the_sum_and_the_product():
    """⟨μ, ∇ℓ⟩ of each backward pass alone, whatever was summed before; used twice, not at all."""
    params = {"w": torch.randn(3, 2), "idle": torch.randn(2), "frozen": None}
    direction = {"w": torch.randn(3, 2), "idle": torch.randn(2), "frozen": None}
    total = GradientSum(params, widen=False)
    stream = GradientStream(total, direction)
    wanted = torch.zeros(3, 2)
    for scale in (1.0, -2.0):
        x = torch.randn(4, 3)
        loss = (x @ stream.params["w"]).square().sum() + stream.params["w"].sum() * scale
        gradient = 2.0 * x.T @ (x @ params["w"]) + scale
        found = stream.backward(torch.tensor(scale), loss)
        torch.testing.assert_close(found, (gradient * direction["w"]).sum())
        wanted += scale * gradient
        assert all(leaf.grad is None for leaf in tree.leaves(stream.params))
    found = total.mean(1.0)
    torch.testing.assert_close(found["w"], wanted)
    assert found["idle"] is None
    assert GradientStream(total, None).backward(torch.tensor(1.0), torch.tensor(1.0)) is None
    constant = GradientStream(total, direction).backward(torch.tensor(1.0), torch.tensor(1.0))
    assert constant == 0.0


def test_a_stream_may_sum_into_gradients_that_look_shared():
    """Two leaves whose gradients are one tensor, of one number spread over all entries."""
    params = {"a": torch.ones(3), "b": torch.ones(3)}
    total = GradientSum(params, widen=False)
    stream = GradientStream(total, None)
    for factor in (2.0, 5.0):
        loss = (stream.params["a"] + stream.params["b"]).sum()
        stream.backward(torch.tensor(factor), loss)
    found = total.mean(1.0)
    assert found["a"].tolist() == found["b"].tolist() == [7.0, 7.0, 7.0]


def test_a_stream_is_freed_when_it_is_dropped():
    """Its hooks do not hold the tensors that they hang on."""
    gc.disable()
    try:
        stream = GradientStream(GradientSum({"w": torch.ones(2)}, widen=False), None)
        stream.backward(torch.tensor(1.0), stream.params["w"].sum())
        leaf = weakref.ref(stream.params["w"])
        del stream
        assert leaf() is None
    finally:
        gc.enable()


WIDTH, DEPTH = 200, 8


def deep_problem():
    def losses(lower, batch):
        for name in sorted(lower):
            batch = torch.tanh(batch @ lower[name])
        return batch.square().mean(1), None

    problem = ReweightingProblem(
        losses, lambda upper, batch, features: upper, lambda lower, upper, batch: upper.sum()
    )
    return problem, {f"w{i}": torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for i in range(DEPTH)}


def test_streamed_and_kept_gradients_have_the_same_bits():
    problem, params = deep_problem()
    direction = random_like(params, 1)
    upper = torch.tensor([0.3])
    batches = [torch.randn(1, WIDTH) for _ in range(3)]

    def run(differentiate, along):
        return lower_pass(
            problem,
            Dot(),
            params,
            upper,
            batches,
            differentiate=differentiate,
            direction=along,
        )

    kept, streamed, plain = run(True, None), run(True, direction), run(False, None)
    assert same_bits(kept.grads, streamed.grads)
    assert same_bits(kept.grads, plain.grads)
    for one, other in zip(kept.micro_batches, streamed.micro_batches, strict=True):
        assert torch.equal(one.dots(direction), other.dots(direction))
    assert all(micro.dots is None for micro in plain.micro_batches)


def test_a_stream_never_holds_a_whole_gradient():
    """The sum alone grows with the parameters, whatever the number of micro-batches."""
    problem, params = deep_problem()
    size = 4 * DEPTH * WIDTH**2
    batches = [torch.randn(1, WIDTH) for _ in range(5)]

    def peak(differentiate, along):
        return peak_bytes(
            lambda: lower_pass(
                problem,
                Dot(),
                params,
                torch.ones(1),
                batches,
                differentiate=differentiate,
                direction=along,
            )
        )

    direction = random_like(params, 1)
    peak(True, direction)
    for differentiate, along in ((True, direction), (False, None)):
        assert peak(differentiate, along) <= (1.0 + 2.0 / DEPTH) * size
    assert peak(True, None) >= 5.0 * size
