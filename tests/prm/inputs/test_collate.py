from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from prm.inputs.collate import Collator
from prm.inputs.prompt import PromptEncoder
from prm.inputs.tiles import Tiler
from prm.schema import DataError
from tests.prm.tiny import (
    SYSTEM,
    example,
    image_processor,
    internvl,
    qwen,
    save_image,
    word_tokenizer,
)


@pytest.fixture
def images(tmp_path):
    return (
        save_image(tmp_path / "wide.png", 100, 60, seed=1),
        save_image(tmp_path / "tall.png", 50, 200, seed=2),
    )


@pytest.fixture
def mixed(images):
    """One image, text only, two images, the first image again."""
    return [
        example("a", 3, images[:1], domain="x", correct=True),
        example("b", 2, domain="y", correct=False),
        example("c", 5, images, domain="x"),
        example("d", 1, images[:1], domain="x"),
    ]


def test_batch_of_mixed_rows(mixed, images):
    collator = internvl().collator(
        system_prompt=SYSTEM,
        max_patches=4,
        index={"d": 0, "c": 1, "b": 2, "a": 3},
        domains={"x": 0, "y": 1},
    )
    batch = collator(mixed)
    assert isinstance(collator.images, Tiler)
    wide, tall = map(collator.images.tiles, images)
    assert batch["num_patches"].tolist() == [len(wide), 0, len(wide) + len(tall), len(wide)]
    assert torch.equal(batch["pixel_values"], torch.cat([wide, wide, tall, wide]))
    context = collator.prompt.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    held = (batch["input_ids"] == context).sum(-1)
    assert held.tolist() == [4 * count for count in batch["num_patches"].tolist()]
    nan = math.nan
    labels = [[1, 0, nan, nan, nan], [1, 0] + [nan] * 3, [1, 0, nan, 0.25, 1], [1] + [nan] * 4]
    torch.testing.assert_close(batch["labels"], torch.tensor(labels), equal_nan=True)
    assert batch["step_mask"].sum(-1).tolist() == [3, 2, 5, 1]
    torch.testing.assert_close(batch["correct"], torch.tensor([1.0, 0.0, nan, nan]), equal_nan=True)
    assert batch["index"].tolist() == [3, 2, 1, 0]
    assert batch["domain"].tolist() == [0, 1, 0, 0]


def test_rows_hold_the_encoded_example_and_padding(mixed):
    collator = internvl().collator(system_prompt=SYSTEM)
    batch = collator(mixed)
    for place, item in enumerate(mixed):
        encoded = collator.encode(item)
        real = torch.arange(batch["input_ids"].shape[1]) < len(encoded.input_ids)
        assert torch.equal(batch["attention_mask"][place], real.long())
        assert batch["input_ids"][place][real].tolist() == encoded.input_ids.tolist()
        assert (batch["input_ids"][place][~real] == collator.prompt.tokenizer.pad_token_id).all()
        mask = batch["step_mask"][place]
        assert mask.sum() == len(item.steps)
        assert batch["label_positions"][place][mask].equal(encoded.label_positions)
        assert (batch["label_positions"][place][~mask] == 0).all()


def test_text_only_batches_have_no_pixel_values(mixed):
    assert "pixel_values" not in internvl().collator()(mixed[1:2])
    batch = qwen().collator()(mixed[1:2])
    assert batch["num_patches"].tolist() == [0]
    assert not {"pixel_values", "index", "domain"} & set(batch)


def test_encoding_happens_once_and_collates_to_the_same_batch(mixed, monkeypatch):
    collator = internvl().collator(system_prompt=SYSTEM)
    fresh = collator(mixed)
    encoded = [collator.encode(item) for item in mixed]
    monkeypatch.setattr(collator.prompt, "encode", None)
    for _epoch in range(2):
        (again,) = DataLoader(encoded, batch_size=4, collate_fn=collator)
        torch.testing.assert_close(again, fresh, equal_nan=True)


def test_each_file_is_decoded_once_per_batch(mixed, images, monkeypatch):
    import prm.inputs.tiles

    decoded = []
    read = prm.inputs.tiles.read_image
    monkeypatch.setattr(
        "prm.inputs.tiles.read_image", lambda path: decoded.append(path) or read(path)
    )
    collator = internvl().collator(cache_bytes=0)
    collator(mixed)
    assert decoded == list(images)


def test_workers_report_the_data_error(mixed, images):
    collator = internvl().collator()
    encoded = [collator.encode(item) for item in mixed]
    images[0].write_bytes(images[0].read_bytes()[:200])
    loader = DataLoader(encoded, batch_size=4, collate_fn=collator, num_workers=1)
    with pytest.raises(Exception, match=r"wide\.png: expected a complete, readable image"):
        next(iter(loader))


def test_errors_name_the_example(mixed, images, tmp_path):
    collator = internvl().collator(index={"a": 0}, domains={"x": 0})
    with pytest.raises(DataError, match="one of the 1 ids that have a row, found 'b'"):
        collator(mixed[1:2])
    with pytest.raises(DataError, match=r"'b'.*domain among 'x', found 'y'"):
        internvl().collator(domains={"x": 0})(mixed[1:2])
    with pytest.raises(DataError, match="without images"):
        qwen().collator().encode(mixed[0])
    with pytest.raises(DataError, match="no such file"):
        collator.encode(example("a", 1, (tmp_path / "none.png",)))
    with pytest.raises(ValueError, match="at least one example"):
        collator([])
    encoded = internvl().collator(max_patches=1).encode(mixed[0])
    with pytest.raises(DataError, match="encode with the collator that collates"):
        collator([encoded])


def test_a_model_s_length_is_the_default_limit():
    prm = qwen()
    assert prm.collator().prompt.max_length == 4096
    assert prm.collator(max_length=None).prompt.max_length is None


def test_labels_of_steps_that_are_cut_off_are_no_targets():
    prm = qwen()
    whole = example(labels=(1, 0, 1), correct=True)
    two = replace(whole, steps=whole.steps[:2])
    longest = len(prm.collator().encode(whole).input_ids) - 1
    collator = prm.collator(max_length=longest, too_long="truncate")
    encoded = collator.encode(whole)
    assert encoded.example == two
    batch, expected = collator([encoded]), prm.collator()([two])
    assert batch["labels"].tolist() == [[1.0, 0.0]]
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


def test_options_that_cannot_work_are_refused():
    text_only = PromptEncoder(word_tokenizer())
    with pytest.raises(ValueError, match="both images and a prompt with image_tokens"):
        Collator(text_only, Tiler(image_processor()))
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="padding token, found none"):
        Collator(PromptEncoder(tokenizer))


def test_other_rows_change_nothing_else(mixed):
    collator = internvl().collator(system_prompt=SYSTEM, index={"a": 0})
    other = collator.with_rows({"a": 7, "d": 2}, {"x": 5})
    batch = other([collator.encode(mixed[0]), mixed[3]])
    assert batch["index"].tolist() == [7, 2]
    assert batch["domain"].tolist() == [5, 5]
    plain = collator.with_rows(None)([mixed[0], mixed[3]])
    assert plain.keys() == batch.keys() - {"index", "domain"}
    torch.testing.assert_close(plain, {name: batch[name] for name in plain}, equal_nan=True)
    assert other.images is collator.images  # and its cache
    with pytest.raises(DataError, match="one of the 1 ids"):
        collator(mixed[3:])
