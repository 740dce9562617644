"""Where the frozen front of a model ends, for every family; passes that go on from there."""

from __future__ import annotations

import pytest
import torch

from prm.models.adapters import add_lora
from prm.models.boundary import Boundary, find_boundary, frozen_states, going_on
from prm.models.model import split_parameters
from tests.prm.tiny import internvl, llama, qwen, qwen2_5_vl, qwen2_vl

TOWER, PROJECTOR = "vision_tower", "multi_modal_projector"
TEXT = ("embed_tokens", "layers.0")


def boundary_of(prm, *freeze: str) -> tuple[str, int] | None:
    trained, _ = split_parameters(prm.model, freeze)
    found = find_boundary(prm.model, trained)
    return None if found is None else (found.place, found.layers)


@pytest.mark.parametrize("make", [qwen, llama])
def test_of_a_text_model_the_first_frozen_layers(make):
    assert boundary_of(make(), *TEXT) == ("layers", 1)
    assert boundary_of(make(), *TEXT, "layers.1") == ("layers", 2)
    assert boundary_of(make(), *TEXT, "layers.1", "lm_head") == ("layers", 2)
    assert boundary_of(make(), "embed_tokens", "layers.1") is None
    assert boundary_of(make(), "layers.0") is None
    assert boundary_of(make()) is None


def test_a_tied_head_is_frozen_with_the_embedding():
    assert boundary_of(qwen(tied=True), "lm_head", "layers.0") == ("layers", 1)
    assert boundary_of(qwen(tied=True), "layers.0") is None


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        ((TOWER, PROJECTOR, *TEXT), ("layers", 1)),
        ((TOWER, PROJECTOR), ("image features", 0)),
        ((TOWER,), ("vision tower", 0)),
        ((TOWER, *TEXT), ("vision tower", 0)),  # the projector's gradient passes the layers
        ((PROJECTOR, *TEXT), None),
        ((f"{TOWER}.encoder", PROJECTOR), None),
    ],
)
def test_of_a_model_with_a_projector(freeze, expected):
    assert boundary_of(internvl(), *freeze) == expected


@pytest.mark.parametrize("make", [qwen2_vl, qwen2_5_vl])
def test_of_a_model_whose_tower_holds_the_projector(make):
    assert boundary_of(make(), "visual", *TEXT) == ("layers", 1)
    assert boundary_of(make(), "visual") == ("image features", 0)
    assert boundary_of(make(), "visual.blocks") is None


def test_adapters_are_trained_where_they_are():
    pytest.importorskip("peft")
    prm = qwen()
    adapters = add_lora(prm.model, rank=1, targets=("q_proj",), freeze=("layers.0",))
    assert find_boundary(prm.model, adapters).layers == 1
    prm = qwen()
    adapters = add_lora(prm.model, rank=1, targets=("q_proj",))
    assert find_boundary(prm.model, adapters) is None


def test_in_front_are_the_tensors_that_the_states_depend_on():
    prm = qwen()
    trained, _ = split_parameters(prm.model, TEXT)
    boundary = find_boundary(prm.model, trained)
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    before = frozen_states(prm.model, boundary, ids)
    depend = set()
    for name, tensor in prm.model.state_dict().items():
        kept = tensor.clone()
        tensor.add_(1)
        if not torch.equal(frozen_states(prm.model, boundary, ids), before):
            depend.add(name)
        tensor.copy_(kept)
    assert depend
    assert depend == set(boundary.tensors)


def test_states_are_what_the_layer_gives_in_a_whole_pass():
    prm = qwen()
    ids = torch.tensor([[5, 6, 7], [7, 6, 5]])
    outputs = prm.model(ids, output_hidden_states=True)
    found = frozen_states(prm.model, Boundary("layers", 1, ()), {"input_ids": ids})
    assert torch.equal(found, outputs.hidden_states[1])
    assert not found.requires_grad


def test_the_rest_of_the_model_is_not_run_and_put_back():
    prm = qwen()
    called = []
    layers = prm.model.model.layers
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: called.append(number))
    ids, boundary = torch.tensor([[5, 6, 7]]), Boundary("layers", 1, ())
    states = frozen_states(prm.model, boundary, {"input_ids": ids})
    assert called == [0]
    with going_on(prm.model, boundary, states):
        logits = prm.model(ids).logits
    assert called == [0, 1]
    assert not any("forward" in layer.__dict__ for layer in layers)
    assert torch.equal(logits, prm.model(ids).logits)


def test_a_model_that_draws_dropout_is_refused():
    prm = qwen()
    prm.model.train()
    with pytest.raises(ValueError, match="training mode"):
        frozen_states(prm.model, Boundary("layers", 1, ()), {"input_ids": torch.tensor([[5]])})
