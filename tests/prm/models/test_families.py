"""Scores of every kind of model that is supported, against plain forwards and second versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from prm.inputs.patch_grid import TILE_PIXELS, PatchGrid
from prm.inputs.tiles import image_size
from prm.inputs.tokens import patch_tokens
from prm.losses import step_cross_entropy
from prm.models.model import load_prm, save_prm, step_logits
from prm.schema import DataError, StepExample
from tests.prm.tiny import (
    SYSTEM,
    byte_tokenizer,
    example,
    in_float64,
    internvl,
    llama,
    patch_processor,
    qwen,
    qwen2_5_vl,
    qwen2_tokenizer,
    qwen2_vl,
    save_image,
    word_tokenizer,
)

EXACT = {"rtol": 0, "atol": 1e-10}
SEEING = {"internvl": internvl, "qwen2-vl": qwen2_vl, "qwen2.5-vl": qwen2_5_vl}
FAMILIES = {**SEEING, "qwen2": qwen, "llama": llama}
MODEL_INPUTS = (
    "input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids",
)  # fmt: skip


@pytest.fixture
def images(tmp_path):
    wide = save_image(tmp_path / "wide.png", 100, 60, seed=1)
    return wide, save_image(tmp_path / "tall.png", 50, 200, seed=2)


def rows_for(prm, images):
    wide, tall = images
    seen = [(), (), (), ()] if prm.image_tokens is None else [(wide,), (), (wide, tall), (tall,)]
    return [example(name, steps, pictures) for name, steps, pictures in zip(
        "abcd", (3, 2, 5, 1), seen, strict=True
    )]  # fmt: skip


def plain_logits(prm, batch):
    """The model's own forward, its head at every position."""
    return prm.model(**{name: batch[name] for name in MODEL_INPUTS if name in batch}).logits


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("tokenizer", [word_tokenizer, byte_tokenizer])
def test_batch_equals_one_plain_forward_per_step(images, make, tokenizer, monkeypatch):
    prm = in_float64(make(tokenizer()), monkeypatch)
    rows = rows_for(prm, images)
    collator = prm.collator(system_prompt=SYSTEM)
    logits = step_logits(prm, {}, collator(rows))
    for found, row in zip(logits, rows, strict=True):
        for count in range(1, len(row.steps) + 1):
            prefix = StepExample(row.id, row.question, row.images, row.steps[:count])
            last = plain_logits(prm, collator([prefix]))[0, -1, [prm.plus_id, prm.minus_id]]
            torch.testing.assert_close(found[count - 1], last, **EXACT)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_head_at_the_labels_equals_full_logits(images, make):
    prm = make()
    batch = prm.collator(system_prompt=SYSTEM)(rows_for(prm, images))
    whole = plain_logits(prm, batch)
    rows = torch.arange(4)[:, None]
    read = whole[rows, batch["label_positions"]][..., [prm.plus_id, prm.minus_id]]
    torch.testing.assert_close(step_logits(prm, {}, batch), read, **EXACT)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_losses_per_example_are_those_of_the_examples_alone(images, make, monkeypatch):
    prm = in_float64(make(), monkeypatch)
    rows = rows_for(prm, images)
    collator = prm.collator(system_prompt=SYSTEM)

    def losses(batch):
        logits = step_logits(prm, {}, batch)
        return step_cross_entropy(logits, batch["labels"], batch["step_mask"])

    together = losses(collator(rows))
    alone = torch.cat([losses(collator([row])) for row in rows])
    torch.testing.assert_close(together, alone, **EXACT)
    torch.testing.assert_close(losses(collator(rows[::-1])), together.flip(0), **EXACT)


@pytest.mark.parametrize("make", SEEING.values(), ids=SEEING)
def test_each_row_sees_its_own_images(images, make):
    prm = make()
    rows = rows_for(prm, images)
    before = step_logits(prm, {}, prm.collator(system_prompt=SYSTEM)(rows))
    save_image(images[1], 50, 200, seed=9)
    after = step_logits(prm, {}, prm.collator(system_prompt=SYSTEM)(rows))
    changed = ((before - after).abs().amax(-1) > 1e-6).any(-1)
    assert changed.tolist() == [False, False, True, True]


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen2.5-vl"])
def test_saved_model_loads_and_scores_the_same(images, kind, tmp_path):
    prm = SEEING[kind](qwen2_tokenizer(), dtype=torch.float32)
    rows = rows_for(prm, images)
    save_prm(prm, {}, tmp_path / "model")
    loaded = load_prm(tmp_path / "model")
    assert type(loaded.model) is type(prm.model)
    assert loaded.image_tokens == prm.image_tokens
    batches = [each.collator(system_prompt=SYSTEM)(rows) for each in (prm, loaded)]
    torch.testing.assert_close(*batches, rtol=0, atol=0, equal_nan=True)
    logits = [step_logits(each, {}, batches[0]) for each in (prm, loaded)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


# Qwen2-VL's images, written down a second time.


def resized(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """Sides in multiples of 8 with the aspect ratio kept and the area within its bounds."""
    rows, columns = (max(1, round(side / 8)) for side in (height, width))
    if rows * columns * 64 > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(1, math.floor(side / shrink / 8)) for side in (height, width))
    elif round(height / 8) * round(width / 8) * 64 < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * grow / 8) for side in (height, width))
    return 8 * rows, 8 * columns


def patches_by_pillow(image: Image.Image, least: int, most: int) -> torch.Tensor:
    """2 x 2 patches of 4 x 4 pixels at a time, each twice (two frames of a still picture)."""
    height, width = resized(image.height, image.width, least, most)
    pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC)) / 255
    pixels = (pixels - patch_processor().image_mean) / patch_processor().image_std
    rows = []
    for top in range(0, height, 8):
        for left in range(0, width, 8):
            for y in (top, top + 4):
                for x in (left, left + 4):
                    patch = pixels[y : y + 4, x : x + 4].transpose(2, 0, 1)  # [C, 4, 4]
                    rows.append(np.stack([patch, patch], axis=1).ravel())  # [C, 2, 4, 4]
    return torch.tensor(np.stack(rows), dtype=torch.float32)


@pytest.mark.parametrize(
    ("width", "height"), [(100, 60), (50, 200), (8, 8), (3, 3), (5, 90), (64, 64), (37, 41)]
)
@pytest.mark.parametrize("most", [None, 1024])
def test_patches_are_those_of_a_second_implementation(tmp_path, width, height, most):
    processor = patch_processor()
    if most is not None:
        processor.size["longest_edge"] = most
    path = save_image(tmp_path / "x.png", width, height)
    grid = PatchGrid(processor)
    found = grid.inputs(path)
    expected = patches_by_pillow(Image.open(path), 64, most or 2048)
    torch.testing.assert_close(found["pixel_values"], expected, rtol=0, atol=1e-5)
    assert int(found["image_grid_thw"].prod()) == len(expected) == 4 * grid.count(path)


def test_max_patches_counts_in_units_of_an_internvl_tile(tmp_path):
    processor = patch_processor()
    path = save_image(tmp_path / "x.png", 1600, 1000)
    for most in (1, 2, 6):
        tokens = PatchGrid(processor, max_patches=most).count(path)
        height, width = resized(1000, 1600, 64, most * TILE_PIXELS)
        assert tokens == height * width // 64
        assert 0.9 * most * TILE_PIXELS < tokens * 64 <= most * TILE_PIXELS
    assert PatchGrid(processor).count(path) <= 32  # the processor's own bound
    with pytest.raises(ValueError, match="max_patches >= 1, found 0"):
        PatchGrid(processor, max_patches=0)


def test_text_of_an_image_is_that_of_qwens_template(images):
    """Start, one placeholder per merged patch, end, and what follows at once."""
    prm = qwen2_vl()
    collator = prm.collator(system_prompt=SYSTEM)
    row = example("a", 1, images)
    ids = collator.encode(row).input_ids.tolist()
    counts = [resized(*image_size(path), 64, 2048) for path in images]
    pictures = "".join(
        f"<|vision_start|>{'<|image_pad|>' * (height * width // 64)}<|vision_end|>"
        for height, width in counts
    )
    text = collator.prompt.text(StepExample("a", row.question, (), row.steps))
    text = text.replace("<|im_start|>user\n", f"<|im_start|>user\n{pictures}")
    assert ids == prm.tokenizer(text, add_special_tokens=False)["input_ids"]
    batch = collator([row, example("b", 1)])
    inside = batch["mm_token_type_ids"] == 1
    assert inside.sum(-1).tolist() == [sum(h * w // 64 for h, w in counts), 0]


def test_patches_have_positions_in_two_dimensions(images):
    """Without the types of the tokens the model would number a picture's patches like words."""
    prm = qwen2_5_vl()
    batch = prm.collator(system_prompt=SYSTEM)(rows_for(prm, images))
    logits = step_logits(prm, {}, batch)
    del batch["mm_token_type_ids"]
    changed = (step_logits(prm, {}, batch) - logits).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [True, False, True, True]


def test_images_that_cannot_be_resized_or_change_are_refused(tmp_path):
    grid = PatchGrid(patch_processor())
    with pytest.raises(DataError, match=r"found 1 x 300 pixels .*aspect ratio"):
        grid.count(save_image(tmp_path / "thin.png", 1, 300))
    path = save_image(tmp_path / "x.png", 32, 32)
    assert grid.count(path) == 16
    save_image(path, 32, 8)
    with pytest.raises(DataError, match=r"expected 16 tiles, as counted .* found 4"):
        grid.inputs(path)
    with pytest.raises(ValueError, match=r"image_grid_thw.* found object"):
        PatchGrid(object())


def test_tokens_of_another_model_are_refused():
    tokenizer = word_tokenizer()
    config = qwen2_vl(tokenizer).model.config
    config.vision_start_token_id = 999
    with pytest.raises(ValueError, match="found none for vision_start_token_id 999"):
        patch_tokens(tokenizer, config)
    with pytest.raises(ValueError, match="vision_end_token_id None"):
        patch_tokens(tokenizer, qwen(tokenizer).model.config)


def test_placeholders_that_a_template_swallows_are_refused(images):
    prm = qwen2_vl(word_tokenizer())
    template = prm.tokenizer.chat_template
    prm.tokenizer.chat_template = template.replace(
        "message['content'] +", "message['content'].replace('<|image_pad|>', '') +"
    )
    with pytest.raises(ValueError, match=r"renders 2 image placeholders .* found 0"):
        prm.collator(system_prompt=SYSTEM).encode(example("a", 1, images))
