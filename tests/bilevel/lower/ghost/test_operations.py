"""Rules of the taps one by one: weighted gradients and products against a loop over examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bilevel import SGD, Auto, Ghost, Jvp, OneStep, PerExample, Refusal, ReweightingProblem, tree
from bilevel.lower.ghost import context, uses
from bilevel.lower.lower_pass import lower_pass
from bilevel.routes import Route
from tests.bilevel.run_window import run_step
from tests.oracles import per_example_gradients, random_like

BATCH, STEPS, SIZE = 4, 3, 6
WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 1.3], dtype=torch.float64)


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def problem_of(output, rows=None) -> ReweightingProblem:
    """Losses are a fixed nonlinear function of ``output(params, batch)``, example by example."""

    def per_example_loss(params, batch):
        values = output(params, batch)
        assert len(values) == BATCH
        values = values.reshape(BATCH, -1)
        return (values.sin() * torch.linspace(0.5, 2.0, values.shape[1]).to(values)).sum(1), None

    return ReweightingProblem(
        per_example_loss,
        lambda upper, batch, features: upper,
        lambda lower, upper, batch: upper.sum(),
        rows=rows,
    )


def batch_of():
    return {
        "x": draw(BATCH, STEPS, SIZE),
        "flat": draw(BATCH, SIZE),
        "tokens": torch.tensor([[1, 2, 0], [3, 3, 3], [0, 0, 4], [2, 1, 4]]),
        "kind": torch.tensor([1, 0, 1, 3]),
        "signal": draw(BATCH, SIZE, 9),
        "image": draw(BATCH, SIZE, 5, 5),
        "volume": draw(BATCH, 2, 3, 3, 3),
    }


HELD = {
    "matrix": torch.linspace(-1.0, 1.5, BATCH * SIZE, dtype=torch.float64).view(BATCH, SIZE),
    "mask": (torch.arange(BATCH * SIZE) % 3 > 0).double().view(BATCH, SIZE),
}
"""Constants with as many rows as there are examples."""


def recurrence(params, x):
    hidden = torch.zeros(BATCH, SIZE, dtype=x.dtype)
    for step in x.transpose(0, 1):
        hidden = torch.tanh(step @ params["w"] + hidden @ params["u"] + params["b"])
    return hidden


def heads(projected):
    q, k, v = projected.view(BATCH, STEPS, 3, 2, -1).permute(2, 0, 3, 1, 4)
    mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
    return mixed.transpose(1, 2).reshape(BATCH, STEPS, SIZE)


def _linear_out(shape):
    return lambda: {"w": draw(*shape), "b": draw(shape[0])}


# name: (parameters, output as a function of parameters and batch)
OPERATIONS = {
    "linear": (_linear_out((5, SIZE)), lambda p, b: functional.linear(b["x"], p["w"], p["b"])),
    "linear 2d": (
        _linear_out((5, SIZE)),
        lambda p, b: functional.linear(b["flat"], p["w"], p["b"]),
    ),
    "linear, frozen bias": (
        lambda: {"w": draw(5, SIZE)},
        lambda p, b: functional.linear(b["x"], p["w"], torch.ones(5).to(b["x"])),
    ),
    "linear, frozen weight": (
        lambda: {"b": draw(5)},
        lambda p, b: functional.linear(b["x"], torch.ones(5, SIZE).to(b["x"]), p["b"]),
    ),
    "linear, 4 dimensions": (
        _linear_out((5, 5)),
        lambda p, b: functional.linear(b["image"], p["w"], p["b"]),
    ),
    "matmul": (lambda: {"w": draw(SIZE, 5)}, lambda p, b: b["x"] @ p["w"]),
    "matrix times vector": (lambda: {"w": draw(SIZE)}, lambda p, b: b["x"] @ p["w"]),
    "mv": (lambda: {"w": draw(SIZE)}, lambda p, b: torch.mv(b["flat"], p["w"])),
    "mm of a transpose": (lambda: {"w": draw(5, SIZE)}, lambda p, b: b["flat"].mm(p["w"].t())),
    "addmm": (
        lambda: {"w": draw(SIZE, 5), "b": draw(5)},
        lambda p, b: torch.addmm(p["b"], b["flat"], p["w"]),
    ),
    "low rank": (
        lambda: {"a": draw(2, SIZE), "b": draw(SIZE, 2)},
        lambda p, b: b["x"] @ p["a"].T @ p["b"].T * 0.5,
    ),
    "embedding": (
        lambda: {"w": draw(5, SIZE)},
        lambda p, b: functional.embedding(b["tokens"], p["w"]),
    ),
    "embedding with padding": (
        lambda: {"w": draw(5, SIZE)},
        lambda p, b: functional.embedding(b["tokens"], p["w"], padding_idx=0),
    ),
    "embedding of computed indices": (
        lambda: {"w": draw(5, SIZE)},
        lambda p, b: functional.embedding((b["tokens"] * 2 + 1) % 5, p["w"]),
    ),
    "one index per example": (
        lambda: {"w": draw(5, SIZE)},
        lambda p, b: p["w"][b["kind"]] * b["flat"],
    ),
    "positions": (
        lambda: {"w": draw(5, SIZE)},
        lambda p, b: b["x"] + functional.embedding(torch.arange(STEPS), p["w"], padding_idx=1),
    ),
    "layer norm": (
        lambda: {"w": draw(SIZE), "b": draw(SIZE)},
        lambda p, b: functional.layer_norm(b["x"], (SIZE,), p["w"], p["b"]),
    ),
    "layer norm of 2 dimensions": (
        lambda: {"w": draw(STEPS, SIZE), "b": draw(STEPS, SIZE)},
        lambda p, b: functional.layer_norm(b["x"], (STEPS, SIZE), p["w"], p["b"], 1e-3),
    ),
    "layer norm, frozen weight": (
        lambda: {"b": draw(SIZE)},
        lambda p, b: functional.layer_norm(
            b["flat"], (SIZE,), 2 * torch.ones(SIZE).to(b["flat"]), p["b"]
        ),
    ),
    "rms norm": (
        lambda: {"w": draw(SIZE)},
        lambda p, b: functional.rms_norm(b["x"], (SIZE,), p["w"], 1e-3),
    ),
    "group norm": (
        lambda: {"w": draw(SIZE), "b": draw(SIZE)},
        lambda p, b: functional.group_norm(b["image"], 2, p["w"], p["b"]),
    ),
    "conv1d": (
        lambda: {"w": draw(4, SIZE, 3), "b": draw(4)},
        lambda p, b: functional.conv1d(b["signal"], p["w"], p["b"], padding=2, dilation=2),
    ),
    "conv1d, same, groups": (
        lambda: {"w": draw(4, 3, 3)},
        lambda p, b: functional.conv1d(b["signal"], p["w"], padding="same", groups=2),
    ),
    "conv2d": (
        lambda: {"w": draw(4, SIZE, 3, 2), "b": draw(4)},
        lambda p, b: functional.conv2d(b["image"], p["w"], p["b"], stride=(2, 1), padding=(1, 0)),
    ),
    "conv3d": (
        lambda: {"w": draw(4, 2, 2, 2, 2)},
        lambda p, b: functional.conv3d(b["volume"], p["w"], padding="valid"),
    ),
    "scale": (lambda: {"w": draw(SIZE)}, lambda p, b: p["w"] * b["x"]),
    "scale along other axes": (lambda: {"w": draw(STEPS, 1)}, lambda p, b: b["x"].mul(p["w"])),
    "scale by a scalar": (lambda: {"w": draw()}, lambda p, b: b["x"] * p["w"]),
    "shift": (lambda: {"w": draw(1, STEPS, SIZE)}, lambda p, b: b["x"] + p["w"]),
    "difference": (lambda: {"w": draw(SIZE)}, lambda p, b: (p["w"] - b["x"]) * 2),
    "subtrahend": (lambda: {"w": draw(SIZE)}, lambda p, b: b["x"].cos() - p["w"]),
    "affine of the parameter": (
        lambda: {"w": draw(SIZE)},
        lambda p, b: b["x"] * (1 - p["w"] / 3) + b["flat"][:, None] * (2 + -p["w"] * 0.1 - 1),
    ),
    "class token": (
        lambda: {"w": draw(1, 1, SIZE), "v": draw(SIZE)},
        lambda p, b: torch.cat(
            [p["w"].expand(BATCH, -1, -1), b["x"], p["v"].expand(BATCH, 2, SIZE)], dim=1
        ),
    ),
    "pieces of a parameter": (
        lambda: {"w": draw(3 * 5, SIZE), "b": draw(15)},
        lambda p, b: (
            functional.linear(b["x"], p["w"].chunk(3)[1], p["b"][5:10])
            + functional.linear(b["x"], p["w"].view(3, 5, SIZE)[2], p["b"].split(5)[0])
        ),
    ),
    "casts": (
        lambda: {"w": draw(SIZE)},
        lambda p, b: p["w"].to(torch.float64).contiguous().type_as(b["x"])[None, None] * b["x"],
    ),
    "delta on a frozen weight": (
        lambda: {"w": draw(BATCH, SIZE)},
        lambda p, b: functional.linear(b["x"], HELD["matrix"] + p["w"]),
    ),
    "masked weight": (
        lambda: {"w": draw(BATCH, SIZE)},
        lambda p, b: functional.linear(b["x"], p["w"] * HELD["mask"] - HELD["matrix"]),
    ),
    "pruned weight": (
        lambda: {"w": draw(BATCH, SIZE), "v": draw(BATCH, SIZE)},
        lambda p, b: functional.linear(
            b["x"],
            torch.where(HELD["mask"] > 0, p["w"], p["v"] / HELD["matrix"])
            + p["v"].masked_fill(HELD["mask"] > 0, 0.5),
        ),
    ),
    "weight of constants and parameters": (
        lambda: {"w": draw(1, SIZE), "v": draw(BATCH, 2)},
        lambda p, b: functional.linear(
            b["x"],
            torch.cat([p["w"], HELD["matrix"][1:]])
            + torch.cat([HELD["matrix"][:, 2:], p["v"]], dim=1)
            + torch.stack([p["w"][0], *HELD["matrix"][1:]]),
        ),
    ),
    "anchors": (
        lambda: {"w": draw(SIZE, SIZE), "b": draw(SIZE)},
        lambda p, b: b["x"] @ functional.linear(HELD["matrix"], p["w"], p["b"]).T,
    ),
    "products of anchors": (
        lambda: {"w": draw(SIZE, SIZE), "v": draw(5, BATCH), "b": draw(SIZE)},
        lambda p, b: (
            b["x"] @ torch.addmm(p["b"], HELD["matrix"], p["w"]).T
            + b["x"] @ (p["v"] @ HELD["matrix"])[:BATCH].T
        ),
    ),
    "layers of anchors": (
        lambda: {"w": draw(SIZE), "b": draw(SIZE), "c": draw(SIZE, SIZE, 1), "g": draw(SIZE)},
        lambda p, b: (
            b["x"] @ functional.layer_norm(HELD["matrix"], (SIZE,), p["w"], p["b"]).T
            + b["x"] @ functional.rms_norm(HELD["matrix"], (SIZE,), p["g"], 1e-3).T
            + b["x"] @ functional.group_norm(HELD["matrix"], 2, p["g"], p["b"]).T
            + b["x"] @ functional.conv1d(HELD["matrix"][:, :, None], p["c"], p["g"])[..., 0].T
        ),
    ),
    "recurrence from a constant": (
        lambda: {"w": draw(SIZE, SIZE), "u": draw(SIZE, SIZE), "b": draw(SIZE)},
        lambda p, b: recurrence(p, b["x"]),
    ),
    "centred weight": (
        lambda: {"w": draw(5, SIZE)},
        lambda p, b: functional.linear(b["x"], p["w"] - p["w"].mean(0) + p["w"].sum() / 9),
    ),
    "table of vectors and of numbers": (
        lambda: {"w": draw(5, 2, SIZE), "v": draw(5)},
        lambda p, b: b["x"] * p["w"][b["kind"], 0][:, None] * p["v"][b["kind"] - 5][:, None, None],
    ),
    "looked up by a view": (
        lambda: {"w": draw(SIZE, 5)},
        lambda p, b: p["w"].T[b["tokens"]] * 2.0,
    ),
    "last position of each example": (
        _linear_out((5, SIZE)),
        lambda p, b: functional.linear(
            b["x"][torch.arange(BATCH), b["kind"] % STEPS], p["w"], p["b"]
        ),
    ),
    "heads by a permutation": (
        lambda: {"w": draw(3 * SIZE, SIZE), "v": draw(SIZE, 2)},
        lambda p, b: heads(b["x"] @ p["w"].T) @ p["v"],
    ),
    "used twice": (
        lambda: {"w": draw(SIZE, SIZE)},
        lambda p, b: functional.linear(functional.linear(b["x"], p["w"]).tanh(), p["w"]) @ p["w"],
    ),
    "in place on the output": (
        _linear_out((5, SIZE)),
        lambda p, b: functional.linear(b["x"], p["w"], p["b"]).relu_(),
    ),
    "inspected": (
        _linear_out((5, SIZE)),
        lambda p, b: (
            functional.linear(
                b["x"].to(p["w"].dtype), p["w"], p["b"] if p["b"].shape[0] == 5 else None
            )
            / p["w"].detach().norm()
            * float(p["b"].detach().sum())
        ),
    ),
}


def weighted_pass(problem, params, batch, route: Route, direction, known: bool, weights=WEIGHTS):
    """The weighted gradient and the products with `direction` from one pass."""
    passed = lower_pass(
        problem,
        route,
        params,
        weights,
        [batch],
        differentiate=True,
        direction=direction if known else None,
    )
    return passed.grads, passed.micro_batches[0].dots(direction)


@pytest.mark.parametrize("form", ["formed", "contracted"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_rule(name, form, monkeypatch):
    for threshold in ("FORM_SMALL_FROM", "FORM_FROM"):
        monkeypatch.setattr(uses, threshold, 1 if form == "formed" else 10**6)
    make, output = OPERATIONS[name]
    params, batch = make(), batch_of()
    problem, direction = problem_of(output), random_like(params, 5)
    examples = per_example_gradients(problem, params, batch)
    products = torch.stack([tree.vdot(gradient, direction) for gradient in examples]) / BATCH
    for route, known in ((Ghost(), True), (PerExample(), False), (PerExample(0), False)):
        grads, dots = weighted_pass(problem, params, batch, route, direction, known)
        torch.testing.assert_close(dots, products, rtol=1e-11, atol=1e-13)
        for key in params:
            expected = sum(w * g[key] for w, g in zip(WEIGHTS, examples, strict=True)) / BATCH
            torch.testing.assert_close(grads[key], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_weights_of_one_give_autograds_own_bits(name, dtype, monkeypatch):
    make, output = OPERATIONS[name]
    params = tree.map(lambda leaf: leaf.to(dtype), make())
    for key, value in HELD.items():
        monkeypatch.setitem(HELD, key, value.to(dtype))
    batch = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in batch_of().items()
    }
    problem = problem_of(output)
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    losses, _ = problem.per_example_loss(leaves, batch)
    expected = torch.autograd.grad(losses.mean(), list(leaves.values()))
    ones, direction = torch.ones(BATCH, dtype=dtype), random_like(params, 0)
    for known in (True, False):
        grads, _ = weighted_pass(problem, params, batch, PerExample(), direction, known, ones)
        for found, gradient in zip(grads.values(), expected, strict=True):
            assert torch.equal(found, gradient)


def test_chunks_of_rows_make_no_difference(monkeypatch):
    from bilevel.lower.ghost import rows

    left, right = draw(7, 3, 4), draw(7, 3, 5)
    weights, direction = draw(7), draw(4, 5)
    whole = rows.formed(torch.bmm(left.transpose(1, 2), right)).sums(weights, direction)
    for entries in (1, 41, 1000):
        monkeypatch.setattr(rows, "CHUNK_ENTRIES", entries)
        found = rows.products(left, right).sums(weights, direction)
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
        assert rows.products(left, right).sums(None, direction)[0] is None
        assert rows.products(left, right).sums(weights, None)[1] is None


REFUSED = {
    "einsum": lambda p, b: torch.einsum("bti,oi->bto", b["x"], p["w"]),
    "parameter on the left": lambda p, b: p["w"] @ b["x"].transpose(1, 2),
    "product of parameters": lambda p, b: b["x"] @ (p["w"] @ p["w"]),
    "exp": lambda p, b: b["x"] @ p["w"].exp(),
    "penalty": lambda p, b: b["x"] @ p["w"] + p["w"].square().sum(),
    "in place": lambda p, b: b["x"].clone().add_(p["w"][0]),
    "vmap": lambda p, b: torch.vmap(lambda x: functional.linear(x, p["w"]))(b["x"]),
    "divisor": lambda p, b: b["x"] / p["w"][0],
}


@pytest.mark.parametrize("name", REFUSED)
def test_operations_without_a_rule_are_refused_by_name_and_left_to_jvp(name):
    params, batch = {"w": draw(SIZE, SIZE)}, batch_of()
    problem = problem_of(REFUSED[name])
    with pytest.raises(Refusal, match=r"no per-example rule.*'w' \(6,.*Auto\(\)"):
        lower_pass(problem, Ghost(), params, WEIGHTS, [batch])
    assert_falls_back(problem, params, batch, "no per-example rule")


def assert_falls_back(problem, params, batch, reason):
    arguments = (problem, SGD(0.1), params, WEIGHTS, SGD(0.1).init(params), [batch], batch)

    def moved(lower, upper, batch):
        return sum(leaf.sin().sum() for leaf in lower.values())

    problem = ReweightingProblem(
        problem.per_example_loss, problem.weights, moved, rows=problem.rows
    )
    arguments = (problem, *arguments[1:])
    found = run_step(OneStep(Auto()), *arguments)
    expected = run_step(OneStep(Jvp()), *arguments)
    (note,) = [micro.note for micro in found.passed.micro_batches]
    assert reason in note
    torch.testing.assert_close(found.hypergradient, expected.hypergradient, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.lower_params, expected.lower_params, rtol=1e-12, atol=0)


class Escape(torch.autograd.Function):
    """A linear layer that torch's function modes do not see."""

    @staticmethod
    def forward(x, w):
        return x @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, b):
        x, w = ctx.saved_tensors
        return b @ w.T, (x.transpose(1, 2) @ b).sum(0)

    @staticmethod
    def jvp(ctx, x_dot, w_dot):
        x, w = ctx.saved_tensors
        total = x @ w_dot if w_dot is not None else 0
        return total if x_dot is None else total + x_dot @ w


def test_gradients_past_the_taps_are_noticed():
    params, batch = {"w": draw(SIZE, SIZE)}, batch_of()
    problem = problem_of(lambda p, b: Escape.apply(b["x"] @ p["w"], p["w"]))
    with pytest.raises(Refusal, match=r"\['w'\] got a gradient past every torch operation"):
        lower_pass(problem, Ghost(), params, WEIGHTS, [batch])
    assert_falls_back(problem, params, batch, "past every torch operation")


def test_a_part_that_is_recomputed_has_its_taps():
    params, batch = {"w": draw(SIZE, SIZE), "g": draw(SIZE)}, batch_of()
    direction = {name: torch.randn_like(leaf) for name, leaf in params.items()}

    def output(p, b):
        def part(x):
            return torch.tanh(functional.linear(x, p["w"])) * p["g"]

        return checkpoint(part, b["x"] @ p["w"], use_reentrant=False)

    problem = problem_of(output)
    examples = per_example_gradients(problem, params, batch)
    products = torch.stack([tree.vdot(gradient, direction) for gradient in examples]) / BATCH
    for route, known in ((Ghost(), True), (PerExample(), False)):
        grads, dots = weighted_pass(problem, params, batch, route, direction, known)
        torch.testing.assert_close(dots, products)
        for key in params:
            expected = sum(w * g[key] for w, g in zip(WEIGHTS, examples, strict=True)) / BATCH
            torch.testing.assert_close(grads[key], expected)


def test_a_part_that_is_recomputed_with_other_parameters_is_refused():
    """Weights, inputs and outputs are all 4 x 4."""
    net = torch.nn.Linear(4, 4, bias=False, dtype=torch.float64)
    net.forward = lambda x: checkpoint(
        lambda x: functional.linear(x, net.weight), x, use_reentrant=False
    )
    problem = ReweightingProblem(
        lambda p, b: (functional_call(net, p, (b,)).sin().sum(1), None),
        lambda u, b, f: u,
        lambda p, u, b: p["weight"].sum(),
    )
    params, upper, batch = {"weight": draw(4, 4)}, torch.rand(4).double(), draw(4, 4)
    with pytest.raises(Refusal, match=r"activation checkpointing.*bilevel\.functional\(module\)"):
        lower_pass(problem, Ghost(), params, upper, [batch])
    with pytest.raises(RuntimeError, match=r"bilevel\.functional\(module\)"):
        lower_pass(problem, Auto(), params, upper, [batch])


def test_rows_that_are_not_the_batch_must_be_declared():
    params, batch = {"w": draw(SIZE, SIZE)}, batch_of()

    def output(p, b):
        return (b["x"].reshape(-1, SIZE) @ p["w"]).view(BATCH, -1)

    with pytest.raises(Refusal, match=r"\['w'\].*expected the 4 examples.*found 12.*rows"):
        lower_pass(problem_of(output), Ghost(), params, WEIGHTS, [batch])
    assert_falls_back(problem_of(output), params, batch, "found 12")
    owner = torch.arange(BATCH).repeat_interleave(STEPS)
    declared = problem_of(output, rows=lambda batch: {12: owner})
    direction = random_like(params, 0)
    _, dots = weighted_pass(declared, params, batch, Ghost(), direction, True)
    examples = per_example_gradients(declared, params, batch)
    products = torch.stack([tree.vdot(gradient, direction) for gradient in examples]) / BATCH
    torch.testing.assert_close(dots, products, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("route", "known"), [(Ghost(), True), (PerExample(), False)], ids=str)
def test_products_of_all_uses_are_added_together_on_a_device(route, known, monkeypatch):
    """Of rows that are the examples and of rows that are not; the weights are gathered once."""
    monkeypatch.setattr(context, "at_once", lambda _: False)
    params, batch = {"w": draw(SIZE, SIZE), "v": draw(SIZE), "u": draw(SIZE)}, batch_of()
    owner = torch.arange(BATCH).repeat_interleave(STEPS)

    def output(p, b):
        rows = (b["x"].reshape(-1, SIZE) @ p["w"] * p["v"]).tanh() @ p["w"]
        return rows.view(BATCH, STEPS, SIZE) * p["u"]

    problem = problem_of(output, rows=lambda batch: {BATCH * STEPS: owner})
    direction = random_like(params, 0)
    grads, dots = weighted_pass(problem, params, batch, route, direction, known)
    examples = per_example_gradients(problem, params, batch)
    products = torch.stack([tree.vdot(gradient, direction) for gradient in examples]) / BATCH
    torch.testing.assert_close(dots, products, rtol=1e-12, atol=1e-14)
    for key in params:
        expected = sum(w * g[key] for w, g in zip(WEIGHTS, examples, strict=True)) / BATCH
        torch.testing.assert_close(grads[key], expected, rtol=1e-12, atol=1e-14)


def test_declared_rows_that_cannot_be_told_from_the_batch_are_refused():
    params, batch = {"w": draw(SIZE, SIZE)}, batch_of()
    owners = torch.tensor([0, 0, 2, 3])
    problem = problem_of(lambda p, b: b["x"] @ p["w"], rows=lambda batch: {BATCH: owners})
    with pytest.raises(Refusal, match="cannot be told from the size"):
        lower_pass(problem, Ghost(), params, WEIGHTS, [batch])
    natural = problem_of(lambda p, b: b["x"] @ p["w"], rows=lambda b: {BATCH: torch.arange(BATCH)})
    lower_pass(natural, Ghost(), params, WEIGHTS, [batch])
    wrong = problem_of(lambda p, b: b["x"] @ p["w"], rows=lambda b: {7: torch.arange(3)})
    with pytest.raises(Refusal, match=r"expected owners of shape \(7,\), found \(3,\)"):
        lower_pass(wrong, Ghost(), params, WEIGHTS, [batch])


def test_positions_as_many_as_examples_are_not_taken_for_examples():
    """The looked-up rows are the parameter's, not the examples', though there are as many."""
    params = {"w": draw(9, SIZE)}
    batch = {"x": draw(BATCH, BATCH, SIZE)}
    problem = problem_of(lambda p, b: b["x"] + functional.embedding(torch.arange(BATCH), p["w"]))
    direction = random_like(params, 0)
    _, dots = weighted_pass(problem, params, batch, Ghost(), direction, True)
    examples = per_example_gradients(problem, params, batch)
    products = torch.stack([tree.vdot(gradient, direction) for gradient in examples]) / BATCH
    torch.testing.assert_close(dots, products, rtol=1e-11, atol=1e-13)


def test_torchs_own_transformer_layer_falls_back_to_jvp():
    """Its attention works with the batch in dimension 1."""
    layer = nn.TransformerEncoderLayer(SIZE, 2, 8, 0.0, batch_first=True).double()
    params = {name: leaf.detach() for name, leaf in layer.named_parameters()}
    problem = problem_of(lambda p, b: functional_call(layer, p, (b["x"],)))
    with pytest.raises(Refusal, match="multi_head_attention_forward"):
        lower_pass(problem, Ghost(), params, WEIGHTS, [batch_of()])
    assert_falls_back(problem, params, batch_of(), "multi_head_attention_forward")


def test_bfloat16_products_are_accumulated_in_float32():
    params = {"w": draw(SIZE, 64).bfloat16(), "g": draw(64).bfloat16()}
    batch = {"x": draw(BATCH, 50, SIZE).bfloat16()}
    problem = problem_of(lambda p, b: (b["x"] @ p["w"]) * p["g"])
    direction = random_like(params, 0)
    exact = tree.map(torch.Tensor.double, params)
    examples = per_example_gradients(problem, exact, {"x": batch["x"].double()})
    along = tree.map(torch.Tensor.double, direction)
    products = torch.stack([tree.vdot(gradient, along) for gradient in examples]) / BATCH
    weights = WEIGHTS.bfloat16()
    for route, known in ((Ghost(), True), (PerExample(), False), (PerExample(0), False)):
        grads, dots = weighted_pass(problem, params, batch, route, direction, known, weights)
        assert dots.dtype == torch.float32
        assert grads["w"].dtype == torch.bfloat16
        assert (dots - products).norm() / products.norm() < 0.03
    assert math.isfinite(float(products.norm()))
