"""Activation checkpointing changes memory and nothing else, on every route."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from bilevel import (
    CentralDifference,
    Ghost,
    Jvp,
    OneStep,
    PerExample,
    Reverse,
)
from prm.models.activation_checkpointing import checkpointed
from tests.invariants.families import FAMILIES
from tests.invariants.setting import by_route, distance
from tests.prm.tiny import FORWARD_MODE, in_float64, qwen

SEEING = [name for name in FAMILIES if name not in ("llama", "qwen2-vl")]


def switched_on(setup):
    prm = replace(setup.objective.prm, activation_checkpointing=True)
    return replace(setup, objective=replace(setup.objective, prm=prm))


def saved_bytes(setup) -> tuple[int, dict[str, torch.Tensor | None]]:
    """Bytes that autograd holds between the passes (parameters apart), and the gradient."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in setup.lower.items()}
    parameters = {leaf.data_ptr() for leaf in leaves.values()}
    held: dict[int, int] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses, _ = setup.objective.per_example_loss(leaves, setup.batch)
    found = torch.autograd.grad(losses.mean(), leaves.values(), allow_unused=True)
    return sum(held.values()), dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("setup", ["internvl"], indirect=True)
def test_layers_of_the_vision_tower_alone_take_less_and_all_of_them_least(setup):
    prm = replace(setup.objective.prm, activation_checkpointing="vision")
    vision = replace(setup, objective=replace(setup.objective, prm=prm))
    plain, expected = saved_bytes(setup)
    some, found = saved_bytes(vision)
    least, _ = saved_bytes(switched_on(setup))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert least < some < plain


@pytest.mark.parametrize("setup", SEEING, indirect=True)
def test_gradients_are_the_same_bits_with_less_memory(setup):
    """The parameters are not those that the module holds: recomputation must not use the latter."""
    module = dict(setup.objective.prm.model.named_parameters())
    assert all(not torch.equal(leaf, module[name]) for name, leaf in setup.lower.items()
               if "mask_token" not in name)  # fmt: skip
    plain, expected = saved_bytes(setup)
    less, found = saved_bytes(switched_on(setup))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert less < plain / 2


@FORWARD_MODE
@pytest.mark.parametrize("setup", SEEING, indirect=True)
@pytest.mark.parametrize(
    ("route", "order"),
    [
        (Ghost(), "upper-first"),
        (PerExample(), "lower-first"),
        (Jvp(), "lower-first"),
        (Reverse(), "lower-first"),
        (CentralDifference(1e-5), "lower-first"),
    ],
)
def test_hypergradients_are_the_same(setup, route, order):
    expected = by_route(setup, OneStep(route, order))
    found = by_route(switched_on(setup), OneStep(route, order))
    assert distance(found, expected) < 1e-12


def test_layers_are_put_back_and_run_twice(monkeypatch):
    prm = in_float64(qwen(), monkeypatch)
    layers = prm.model.model.layers
    calls = []
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[1, 2, 3]])
    params = {name: leaf.clone().requires_grad_() for name, leaf in prm.model.named_parameters()}
    with checkpointed(prm.model):
        assert all("forward" in layer.__dict__ for layer in layers)
        logits = functional_call(prm.model, params, kwargs={"input_ids": ids}).logits
    assert not any("forward" in layer.__dict__ for layer in layers)
    assert len(calls) == 2
    torch.autograd.grad(logits.sum(), list(params.values()))
    assert len(calls) == 4
    with checkpointed(prm.model), torch.no_grad():
        prm.model(input_ids=ids)
    assert len(calls) == 6


def test_what_stood_in_the_way_is_put_back():
    model = qwen().model
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = own  # as accelerate's hooks do
    with pytest.raises(RuntimeError, match="stop"), checkpointed(model):
        raise RuntimeError("stop")
    assert layer.__dict__["forward"] is own
    assert "forward" not in model.model.layers[1].__dict__


def test_models_without_layers_are_refused():
    with pytest.raises(ValueError, match="does not say which"), checkpointed(torch.nn.Linear(1, 1)):
        pass
