"""Models of other kinds: what their own processors make of text and images is what we make."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from prm.inputs.image_inputs import concatenated, image_inputs
from prm.inputs.processor import ProcessedImages
from prm.models.model import load_prm, save_prm, step_logits
from prm.schema import DataError
from tests.prm.tiny import SYSTEM, example, qwen, qwen2_tokenizer, save_image
from tests.prm.tiny_processed import gemma3, llava, llava_next

EXACT = {"rtol": 0, "atol": 1e-10}
KINDS = [llava, llava_next, gemma3]


@pytest.fixture
def rows(tmp_path):
    wide = save_image(tmp_path / "wide.png", 100, 60, seed=1)
    tall = save_image(tmp_path / "tall.png", 50, 200, seed=2)
    return [
        example("a", 3, (wide,)),
        example("b", 2),
        example("c", 5, (wide, tall)),
        example("d", 1, (tall,)),
    ]


@pytest.mark.parametrize("make", KINDS)
def test_inputs_are_those_of_the_models_own_processor(rows, make):
    prm = make()
    collator = prm.collator(system_prompt=SYSTEM)
    for row in rows:
        found = collator([row])
        expected = prm.image_processor(
            images=[Image.open(path) for path in row.images] or None,
            text=[collator.prompt.text(row)],
            return_tensors="pt",
            add_special_tokens=False,
        )
        assert set(expected) <= set(found)
        for name, value in expected.items():
            torch.testing.assert_close(torch.as_tensor(value), found[name], rtol=0, atol=0)


@pytest.mark.parametrize("make", KINDS)
def test_batch_equals_single_and_the_models_own_forward(rows, make):
    prm = make()
    collator = prm.collator(system_prompt=SYSTEM)
    together = step_logits(prm, {}, collator(rows))
    for row, found in zip(rows, together, strict=True):
        batch = collator([row])
        alone = step_logits(prm, {}, batch)[0]
        torch.testing.assert_close(found[: len(alone)], alone, **EXACT)
        own = ("label_positions", "step_mask", "labels", "correct", "num_patches")
        whole = prm.model(**{name: batch[name] for name in batch if name not in own}).logits
        read = whole[0, batch["label_positions"][0]][:, [prm.plus_id, prm.minus_id]]
        torch.testing.assert_close(alone, read, **EXACT)


@pytest.mark.parametrize("make", KINDS)
def test_each_row_sees_its_own_images(rows, make):
    prm = make()
    before = step_logits(prm, {}, prm.collator(system_prompt=SYSTEM)(rows))
    save_image(rows[3].images[0], 50, 200, seed=9)
    after = step_logits(prm, {}, prm.collator(system_prompt=SYSTEM)(rows))
    changed = ((before - after).abs().amax(-1) > 1e-6).any(-1)
    assert changed.tolist() == [False, False, True, True]


def test_saved_model_and_processor_load(rows, tmp_path):
    prm = llava()
    save_prm(prm, {}, tmp_path / "model")
    loaded = load_prm(tmp_path / "model", dtype=torch.float64)
    assert type(loaded.image_processor) is type(prm.image_processor)
    batches = [each.collator(system_prompt=SYSTEM)(rows) for each in (prm, loaded)]
    torch.testing.assert_close(*batches, rtol=0, atol=0, equal_nan=True)
    logits = [step_logits(each, {}, batches[0]) for each in (prm, loaded)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_text_that_imitates_an_image_is_refused(rows):
    collator = gemma3().collator(system_prompt=SYSTEM)
    for token in ("<boi>", "<image_soft>"):
        forged = type(rows[1])("bad", f"look {token}", (), rows[1].steps)
        with pytest.raises(DataError, match=f"found '{token}'"):
            collator.encode(forged)


def test_shorter_inputs_are_padded_with_zeros():
    values = [torch.ones(1, 2, 3), torch.ones(2, 1, 3)]
    joined = concatenated(values)
    assert joined.sum(-1).tolist() == [[3, 3], [3, 0], [3, 0]]
    assert concatenated(values[:1]) is not None


def test_processors_without_an_image_token_are_refused():
    with pytest.raises(ValueError, match="names the token of an image"):
        ProcessedImages(object())
    with pytest.raises(ValueError, match="crop_to_patches"):
        image_inputs(object())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling.X"}},
            r"needs code from the checkpoint; .* '-hf' .* convert-model",
        ),
        ({"model_type": "mpt_x", "auto_map": {}}, r"such code is never run. Choose one that"),
        ({"model_type": "vit"}, r"image-text-to-text or causal language model, .* 'vit'"),
    ],
)
def test_checkpoints_that_need_code_of_their_own_are_refused(tmp_path, config, words):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise SystemExit('this code ran')\n")
    with pytest.raises(ValueError, match=words):
        load_prm(folder)


def test_a_native_model_with_code_beside_it_runs_the_native_one(tmp_path):
    save_prm(qwen(qwen2_tokenizer()), {}, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.X", "AutoConfig": "modeling.Y"}
    path.write_text(json.dumps(config))
    (tmp_path / "model" / "modeling.py").write_text("raise SystemExit('this code ran')\n")
    assert type(load_prm(tmp_path / "model").model).__name__ == "Qwen2ForCausalLM"
