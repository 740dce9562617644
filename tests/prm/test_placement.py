"""Where and how a model computes; torch's CUDA calls are replaced where a device is needed."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from prm.models.activation_checkpointing import in_vision
from prm.models.model import save_prm, split_parameters, step_logits
from prm.names import Attention, Precision, Recomputed
from prm.placement import Placement, resolve
from tests.prm.tiny import SYSTEM, example, internvl, qwen, save_image


@pytest.fixture
def cuda(monkeypatch):
    """Two CUDA devices with bfloat16, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.fixture
def folder(tmp_path):
    prm = internvl()
    save_prm(prm, {}, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_cpu_computes_in_float32(no_cuda):
    for name in ("auto", "cpu"):
        assert resolve(name) == Placement(torch.device("cpu"), "float32", "auto", "none")


def test_with_a_gpu_it_computes_in_bf16(cuda):
    for name, number in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
        assert resolve(name) == Placement(torch.device("cuda", number), "bf16")
    assert resolve("cpu").precision == "float32"
    assert resolve("cuda", "float32").precision == "float32"


def test_a_gpu_without_bf16_computes_in_float32(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert resolve("cuda").precision == "float32"
    with pytest.raises(ValueError, match=r"^precision bf16-pure: cuda:0 has no bfloat16; use"):
        resolve("cuda", "bf16-pure")


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused(no_cuda, name):
    with pytest.raises(ValueError, match=rf"^device {name}: expected .*, found none; use cpu$"):
        resolve(name)


def test_a_number_beyond_the_last_device_is_refused(cuda):
    with pytest.raises(ValueError, match=r"^device cuda:2: .*, found 2, numbered .*; use cuda:0$"):
        resolve("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "", "CPU", "cpu:0"])
def test_no_other_name_is_a_device(name):
    with pytest.raises(ValueError, match=r"expected auto, cpu, cuda, cuda:N or mps"):
        resolve(name)


def test_mps_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device mps"):
        resolve("mps")


def test_flash_is_refused_where_it_cannot_compute(cuda, monkeypatch):
    with pytest.raises(ValueError, match=r"attention flash: .*CUDA devices only, found cpu; use"):
        resolve("cpu", attention="flash")
    with pytest.raises(ValueError, match=r"attention flash: .*16 bits only"):
        resolve("cuda", "float32", attention="flash")
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match=r"attention flash: the package flash-attn"):
        resolve("cuda", attention="flash")
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert resolve("cuda", attention="flash").attention == "flash"


@pytest.mark.parametrize("precision", get_args(Precision))
def test_the_model_is_loaded_in_its_precision(folder, tmp_path, precision):
    prm = Placement(precision=precision).load(folder)
    parameters = torch.bfloat16 if precision == "bf16-pure" else torch.float32
    assert {p.dtype for p in prm.model.parameters()} == {parameters}
    assert prm.device == torch.device("cpu")
    collator = prm.collator(system_prompt=SYSTEM)
    image = save_image(tmp_path / "a.png", 100, 60, seed=1)
    batch = collator([collator.encode(example("a", 3, (image,)))])
    dtypes = set()
    decoder = prm.model.get_decoder()
    layer = next(m for n, m in decoder.named_modules() if n.endswith("q_proj"))
    layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    with torch.no_grad():
        logits = step_logits(prm, {}, batch)
    assert dtypes == {torch.float32 if precision == "float32" else torch.bfloat16}
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("attention", [a for a in get_args(Attention) if a != "flash"])
def test_the_model_is_loaded_with_its_attention(folder, attention):
    prm = Placement(attention=attention).load(folder)
    found = prm.model.config.text_config._attn_implementation
    assert found == ("sdpa" if attention == "auto" else attention)


@pytest.mark.parametrize("layers", get_args(Recomputed))
def test_the_model_recomputes_what_it_is_told_to(folder, layers):
    prm = Placement(activation_checkpointing=layers).load(folder)
    assert prm.activation_checkpointing == {"none": False, "vision": "vision", "all": True}[layers]


def test_vision_is_what_stands_in_front_of_the_language_model():
    names = [name for name, _ in internvl().model.named_parameters()]
    vision = in_vision(internvl().model, names)
    assert {name.split(".")[1] for name in vision} == {"vision_tower", "multi_modal_projector"}
    assert {name.split(".")[1] for name in set(names) - set(vision)} == {"language_model", "weight"}
    assert in_vision(qwen().model, [name for name, _ in qwen().model.named_parameters()]) == []


def test_recomputing_what_is_not_trained_is_refused():
    placement = Placement(activation_checkpointing="vision")
    prm = internvl()
    whole, _ = split_parameters(prm.model)
    placement.check_trained(whole, prm)
    frozen = ("vision_tower", "multi_modal_projector")
    with pytest.raises(ValueError, match="activation-checkpointing vision: has no effect"):
        placement.check_trained(split_parameters(prm.model, frozen)[0], prm)
    with pytest.raises(ValueError, match="activation-checkpointing vision: has no effect"):
        placement.check_trained(split_parameters(qwen().model)[0], qwen())


def numbered(step: int) -> dict[str, torch.Tensor]:
    return {"step": torch.tensor([step])}


def test_on_the_cpu_batches_are_those_that_were_given():
    assert Placement().batches(numbered, 5) is numbered


def test_batches_are_moved():
    placed = Placement(torch.device("meta")).batches(lambda step: [numbered(step)] * 2, 5)
    assert [batch["step"].device.type for batch in placed(0)] == ["meta", "meta"]
    params = Placement(torch.device("meta")).params({"a": torch.zeros(2)})
    assert params["a"].device.type == "meta"


@pytest.fixture
def prepared(cuda, monkeypatch):
    """The steps whose batches were prepared, in order, for a device that takes them as they are."""
    monkeypatch.setattr("prm.placement.moved", lambda batch, device: batch)
    return []


def test_on_a_gpu_one_batch_is_prepared_ahead(prepared):
    def make(step: int) -> dict[str, torch.Tensor]:
        prepared.append(step)
        return numbered(step)

    placed = Placement(torch.device("cuda", 0)).batches(make, 7, every=2)
    assert placed(0)["step"].item() == 0
    assert prepared == [0, 2]
    assert placed(2)["step"].item() == 2
    assert prepared == [0, 2, 4]
    assert placed(5)["step"].item() == 5  # not the one that was prepared
    assert prepared == [0, 2, 4, 5]  # 7 is behind the last step
    assert placed(4)["step"].item() == 4
    assert prepared == [0, 2, 4, 5, 4, 6]


def test_an_error_ahead_is_raised_where_the_batch_is_asked_for(prepared):
    def make(step: int) -> dict[str, torch.Tensor]:
        prepared.append(step)
        if step == 1:
            raise ValueError("no picture")
        return numbered(step)

    placed = Placement(torch.device("cuda", 0)).batches(make, 3)
    assert placed(0)["step"].item() == 0
    with pytest.raises(ValueError, match="no picture"):
        placed(1)
    assert placed(2)["step"].item() == 2
    assert prepared == [0, 1, 1, 2]
