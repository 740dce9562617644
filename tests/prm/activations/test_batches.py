"""Batches with kept activations: the values of those without, each example computed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prm.activations.batches import FrozenFront
from prm.activations.fingerprint import front_fingerprint
from prm.activations.stores import MemoryStore
from prm.models.boundary import FROZEN_STATES, find_boundary
from prm.models.model import load_prm, save_prm, split_parameters, step_logits
from tests.prm.tiny import (
    SYSTEM,
    example,
    in_float64,
    internvl,
    llama,
    qwen,
    qwen2_5_vl,
    qwen2_vl,
    save_image,
)

LAYERS = ("embed_tokens", "layers.0")
CASES = {
    "llama": (llama, LAYERS),
    "qwen": (qwen, LAYERS),
    "internvl": (internvl, ("vision_tower", "multi_modal_projector", *LAYERS)),
    "internvl-features": (internvl, ("vision_tower", "multi_modal_projector")),
    "internvl-tower": (internvl, ("vision_tower",)),
    "qwen2-vl": (qwen2_vl, ("visual", *LAYERS)),
    "qwen2-vl-features": (qwen2_vl, ("visual",)),
    "qwen2.5-vl": (qwen2_5_vl, ("visual", *LAYERS)),
    "qwen2.5-vl-features": (qwen2_5_vl, ("visual",)),
}


@pytest.fixture
def pictures(tmp_path):
    wide = save_image(tmp_path / "wide.png", 100, 60, seed=1)
    return wide, save_image(tmp_path / "tall.png", 50, 200, seed=2)


def rows_for(prm, pictures):
    wide, tall = pictures
    seen = [(wide,), (), (wide, tall), (tall,)] if prm.image_tokens else [()] * 4
    return [
        example(name, steps, images)
        for name, steps, images in zip("abcd", (3, 2, 5, 1), seen, strict=True)
    ]


def with_boundary(prm, freeze):
    trained, _ = split_parameters(prm.model, freeze)
    return replace(prm, boundary=find_boundary(prm.model, trained)), trained


def graded(prm, trained, batch):
    """Step logits, and the gradient of a sum of them that no two steps share."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in trained.items()}
    logits = step_logits(prm, leaves, batch)
    read = logits[batch["step_mask"]]
    weights = torch.arange(1.0, 1 + read.numel(), dtype=read.dtype).reshape(read.shape)
    grads = torch.autograd.grad((weights * read).sum(), leaves.values(), allow_unused=True)
    return read.detach(), dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize(("make", "freeze"), CASES.values(), ids=CASES)
def test_padded_batches_have_the_same_values_and_gradients(make, freeze, pictures, monkeypatch):
    plain = in_float64(make(), monkeypatch)
    prm, trained = with_boundary(plain, freeze)
    batch = prm.collator(system_prompt=SYSTEM)(rows_for(prm, pictures))
    kept = FrozenFront(prm, MemoryStore(10**9))(batch)
    assert FROZEN_STATES in kept
    assert ("pixel_values" in kept) == (prm.boundary.place != "layers")
    expected, found = graded(plain, trained, batch), graded(prm, trained, kept)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    recomputed = replace(prm, activation_checkpointing=True)
    torch.testing.assert_close(graded(recomputed, trained, kept), found, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "freeze"), CASES.values(), ids=CASES)
def test_batches_of_one_have_the_same_bits(make, freeze, dtype, pictures):
    plain = make(dtype=dtype)
    prm, trained = with_boundary(plain, freeze)
    collator, front = prm.collator(system_prompt=SYSTEM), FrozenFront(prm, MemoryStore(10**9))
    for row in rows_for(prm, pictures):
        batch = collator([row])
        expected, found = graded(plain, trained, batch), graded(prm, trained, front(batch))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_autocast_has_the_same_bits(pictures):
    plain = replace(qwen(dtype=torch.float32), autocast=torch.bfloat16)
    prm, trained = with_boundary(plain, LAYERS)
    batch = prm.collator(system_prompt=SYSTEM)([example("a")])
    kept = FrozenFront(prm, MemoryStore(10**9))(batch)
    expected, found = graded(plain, trained, batch), graded(prm, trained, kept)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_bits_do_not_depend_on_the_other_rows_nor_on_the_store(pictures):
    prm, _ = with_boundary(internvl(dtype=torch.float32), CASES["internvl"][1])
    rows = rows_for(prm, pictures)
    collator = prm.collator(system_prompt=SYSTEM)
    forgetful = FrozenFront(prm, MemoryStore(0))
    together = forgetful(collator(rows))[FROZEN_STATES]
    keeping = FrozenFront(prm, MemoryStore(10**9))
    keeping(collator(rows))
    for states, row in zip(together, rows, strict=True):
        alone = keeping(collator([row]))[FROZEN_STATES][0]
        assert torch.equal(states[: len(alone)], alone)
        assert not states[len(alone) :].any()
    assert forgetful.store.bytes == 0 < keeping.store.bytes


def test_every_example_goes_through_the_frozen_layers_once(pictures):
    prm, trained = with_boundary(internvl(), CASES["internvl"][1])
    calls = {"tower": 0, "frozen": 0, "trained": 0}
    base = prm.model.model
    for name, module in (
        ("tower", base.vision_tower.encoder.layer[0].mlp),
        ("frozen", base.language_model.layers[0].mlp),
        ("trained", base.language_model.layers[1].mlp),
    ):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    rows, collator = rows_for(prm, pictures), prm.collator(system_prompt=SYSTEM)
    front = FrozenFront(prm, MemoryStore(10**9))
    for order in ([0, 1], [2, 3], [3, 0], [1, 2], [2, 0]):
        step_logits(prm, trained, front(collator([rows[row] for row in order])))
    assert calls == {"tower": 3, "frozen": 4, "trained": 5}


def test_pictures_are_kept_by_their_content_whatever_the_text(pictures):
    prm, _ = with_boundary(internvl(), CASES["internvl-features"][1])
    wide, tall = pictures
    collator, store = prm.collator(system_prompt=SYSTEM), MemoryStore(10**9)
    front = FrozenFront(prm, store)
    text = collator([example("t")])
    assert front(text) is text
    first = front(collator([example("a", 2, (wide,))]))[FROZEN_STATES]
    size = store.bytes
    assert torch.equal(front(collator([example("b", 5, (wide,))]))[FROZEN_STATES], first)
    assert store.bytes == size
    other = collator.with_rows(None)([example("a", 2, (tall,))])
    assert front(other)[FROZEN_STATES].shape != first.shape


def test_a_pass_needs_the_boundary_of_its_batch():
    prm, _ = with_boundary(qwen(), LAYERS)
    kept = FrozenFront(prm, MemoryStore(0))(prm.collator(system_prompt=SYSTEM)([example("a")]))
    with pytest.raises(ValueError, match=r"set PRM\.boundary"):
        step_logits(replace(prm, boundary=None), {}, kept)


def test_inputs_that_cannot_be_divided_are_refused():
    prm, _ = with_boundary(qwen(), LAYERS)
    batch = prm.collator(system_prompt=SYSTEM)([example("a")])
    batch["position_ids"] = torch.arange(3)[None]
    with pytest.raises(ValueError, match="takes position_ids, which cannot be divided"):
        FrozenFront(prm, MemoryStore(0))(batch)


def test_a_model_that_uses_its_input_behind_the_boundary_again_is_found():
    prm, _ = with_boundary(qwen(), LAYERS)
    batch = prm.collator(system_prompt=SYSTEM)([example("a")])
    front = FrozenFront(prm, MemoryStore(10**9))
    front.check(batch)
    first = prm.model.model.layers[0]
    seen = []
    first.mlp.register_forward_hook(lambda _, __, output: seen.append(output))
    prm.model.model.norm.register_forward_hook(lambda _, __, output: output + len(seen))
    with pytest.raises(ValueError, match="found that Qwen2ForCausalLM does not"):
        FrozenFront(prm, MemoryStore(10**9)).check(batch)


def test_the_fingerprint_is_of_what_the_activations_depend_on(tmp_path):
    prm, trained = with_boundary(llama(dtype=torch.float32), LAYERS)
    before = front_fingerprint(prm)
    save_prm(prm, {name: leaf + 1 for name, leaf in trained.items()}, tmp_path / "later")
    later, _ = with_boundary(load_prm(tmp_path / "later"), LAYERS)
    assert front_fingerprint(later) == before  # only what is trained has moved
    assert front_fingerprint(replace(prm, autocast=torch.bfloat16)) != before
    deeper, _ = with_boundary(prm, (*LAYERS, "layers.1"))
    assert front_fingerprint(deeper) != before
    prm.model.config.rms_norm_eps *= 2
    assert front_fingerprint(prm) != before
    prm.model.config.rms_norm_eps /= 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert front_fingerprint(prm) != before
    finally:
        torch.set_num_threads(threads)
    assert front_fingerprint(prm) == before
    prm.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    assert front_fingerprint(prm) != before
