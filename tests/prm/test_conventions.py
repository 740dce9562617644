"""``prm.json``: what is written is read back, and what cannot be right is refused by its name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from prm.conventions import FILE, FORMAT, LAYOUT, Conventions, read_conventions, write_conventions
from prm.inputs.prompt import SYSTEM_PROMPT
from prm.inputs.tiles import read_image
from prm.models.model import load_prm, save_prm
from prm.schema import DataError
from tests.prm.tiny import SYSTEM, example, internvl, qwen, qwen2_tokenizer, save_image

OWN = Conventions(
    plus_id=12,
    minus_id=13,
    system_prompt="judge «each» step",
    context="gold",
    max_patches=5,
    probability="vocabulary",
    aggregation="min",
    threshold=0.1 + 0.2,
)


def test_what_is_written_is_read_back(tmp_path):
    for conventions in (OWN, replace(OWN, system_prompt=None, max_patches=None, threshold=1)):
        write_conventions(tmp_path / FILE, conventions)
        assert read_conventions(tmp_path / FILE) == conventions
    write_conventions(tmp_path / FILE, OWN)
    assert json.loads((tmp_path / FILE).read_text(encoding="utf-8")) == {
        "format": 1,
        "labels": {"+": 12, "-": 13},
        "layout": {
            "first_turn": "### Question:\n{question}\n\n### Solution Process:\n{step}",
            "turn": "{step}",
            "slot": "{label}",
        },
        "system_prompt": "judge «each» step",
        "context": "gold",
        "max_patches": 5,
        "probability": "vocabulary",
        "aggregation": "min",
        "threshold": 0.30000000000000004,
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"format": FORMAT + 1},
            "field format: expected 1, the newest .* found 2; install",
        ),
        ({"format": True}, "field format: expected 1, found True"),
        ({"format": 0}, "field format: expected 1, found 0"),
        ({"context": None}, "field context: expected the fields .* found nothing"),
        ({"contxt": "plus"}, "field contxt: expected the fields .* found a field of this name"),
        (
            {"context": "golden"},
            "field context: expected one of plus, gold, masked, found 'go",
        ),
        ({"system_prompt": 3}, "field system_prompt: expected a text, or null, found 3"),
        (
            {"max_patches": 0},
            "field max_patches: expected a number of at least 1, or null,",
        ),
        ({"max_patches": True}, "field max_patches: .* found True"),
        ({"probability": ["labels"]}, "field probability: expected one of labels, vocabulary"),
        ({"aggregation": "median"}, "field aggregation: expected one of mean, min, .*'median'"),
        ({"threshold": 1.5}, r"field threshold: expected a number in \[0, 1\], found 1.5"),
        ({"threshold": float("nan")}, "field threshold: .* found nan"),
        ({"labels": {"+": 12, "-": 12}}, "field labels: expected the ids of two tokens"),
        ({"labels": {"+": 12}}, "field labels: expected the ids of two tokens"),
        ({"labels": [12, 13]}, "field labels: expected the ids of two tokens"),
        ({"layout": {**LAYOUT, "turn": "Step: {step}"}}, "field layout: expected .* only layout"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, change, said):
    write_conventions(tmp_path / FILE, OWN)
    content = json.loads((tmp_path / FILE).read_text(encoding="utf-8")) | change
    kept = {name: value for name, value in content.items() if (name, value) != ("context", None)}
    (tmp_path / FILE).write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(DataError, match=rf"(?s)prm\.json: {said}"):
        read_conventions(tmp_path / FILE)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "Expecting value"),
        (b'{"format": 1', "Expecting"),
        (b"[1]", "a list"),
        (b"\xff", "utf-8"),
        (b'{"format": 1, "format": 1}', "a key that is there twice"),
        (b"[" * 100_000, "recursion"),
        (b" " * (2**20 + 1), "more than 1,048,576 bytes"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, found):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DataError, match=rf"(?i)prm\.json: expected a JSON object.*{found}"):
        read_conventions(tmp_path / FILE)


def test_values_are_checked_when_they_are_set_in_python():
    with pytest.raises(ValueError, match="aggregation: expected one of mean, min"):
        replace(OWN, aggregation="median")
    with pytest.raises(ValueError, match="expected two label tokens, found 12 for both"):
        replace(OWN, minus_id=12)


def test_the_layout_is_the_one_that_examples_get():
    """The turns of an example, from the layout in the file alone."""
    row = example("a", 3)
    turns = internvl().collator(system_prompt=SYSTEM).prompt.messages(row)
    expected = [{"role": "system", "content": SYSTEM}]
    for number, step in enumerate(row.steps):
        text = LAYOUT["turn" if number else "first_turn"]
        said = text.replace("{step}", step.text).replace("{question}", row.question)
        expected.append({"role": "user", "content": said})
        expected.append({"role": "assistant", "content": LAYOUT["slot"].replace("{label}", "+")})
    assert turns == expected


@pytest.fixture
def saved(tmp_path):
    prm = internvl(dtype=torch.float32)
    own = replace(OWN, plus_id=prm.plus_id, minus_id=prm.minus_id)
    save_prm(replace(prm, conventions=own), {}, tmp_path / "model")
    return tmp_path / "model", own


def test_a_saved_model_is_asked_as_it_says(saved, tmp_path):
    path, own = saved
    prm = load_prm(path)
    assert prm.conventions == prm.usage == own
    row = example("a", 3, (save_image(tmp_path / "wide.png", 200, 50, seed=1),))
    given = prm.collator(context="gold", system_prompt="judge «each» step", max_patches=5)
    torch.testing.assert_close(prm.collator()([row]), given([row]), rtol=0, atol=0, equal_nan=True)
    other = prm.collator(context="plus", system_prompt=None, max_patches=1)([row])
    assert other["input_ids"].shape[1] < given([row])["input_ids"].shape[1]


def test_a_model_that_does_not_say_is_asked_by_the_defaults(tmp_path):
    save_prm(internvl(dtype=torch.float32), {}, tmp_path / "model")
    assert not (tmp_path / "model" / FILE).exists()
    prm = load_prm(tmp_path / "model")
    assert prm.conventions is None
    assert prm.usage == Conventions(
        plus_id=prm.plus_id, minus_id=prm.minus_id, system_prompt=SYSTEM_PROMPT
    )
    prompt = prm.collator().prompt
    assert (prompt.context, prompt.system_prompt) == ("plus", SYSTEM_PROMPT)


def test_label_tokens_of_another_tokenizer_are_refused(saved):
    path, own = saved
    write_conventions(path / FILE, replace(own, plus_id=own.minus_id, minus_id=own.plus_id))
    with pytest.raises(DataError, match=r"prm\.json: field labels: expected the ids of the token"):
        load_prm(path)


def test_a_damaged_file_refuses_the_model(saved):
    (saved[0] / FILE).write_text("{}")
    with pytest.raises(DataError, match=r"model/prm\.json: field format: expected the fields"):
        load_prm(saved[0])


def test_plain_transformers_loads_the_folder(saved, tmp_path):
    """AutoProcessor of InternVL needs torchvision, of which the file it reads is compared."""
    path, _ = saved
    assert type(AutoModelForImageTextToText.from_pretrained(path)).__name__.startswith("InternVL")
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.encode("+", add_special_tokens=False) == [12]
    assert json.loads((path / "processor_config.json").read_text()) == {
        "image_seq_length": 4,
        "processor_class": "InternVLProcessor",
    }
    text = qwen(qwen2_tokenizer(), dtype=torch.float32)
    own = replace(OWN, plus_id=text.plus_id, minus_id=text.minus_id)
    save_prm(replace(text, conventions=own), {}, tmp_path / "text")
    processor = AutoProcessor.from_pretrained(tmp_path / "text")
    assert processor("+")["input_ids"] == [text.plus_id]


def test_auto_processor_prepares_an_example_as_we_do(saved, tmp_path):
    """Nothing but torchvision is missing, and it takes images by another resize than PIL's."""
    pytest.importorskip("torchvision", reason="InternVL's processor needs it, for videos")
    processor = AutoProcessor.from_pretrained(saved[0])
    prm = load_prm(saved[0])
    wide = save_image(tmp_path / "wide.png", 200, 50, seed=1)
    row = example("a", 3, (wide,))
    collator = prm.collator()
    batch, ours = collator([row]), collator.encode(row)
    text = prm.tokenizer.apply_chat_template(collator.prompt.messages(row), tokenize=False)

    def prepared():
        image = read_image(wide)
        return processor(images=[image], text=[text], return_tensors="pt", max_patches=5)

    inputs = prepared()
    ids = inputs["input_ids"][0]
    assert ids[: len(ours.input_ids)].tolist() == list(ours.input_ids)  # up to the last label
    assert len(ids) - len(ours.input_ids) == 2  # which follows there, with its end of turn
    eight_bits = 1 / 255 / min(processor.image_processor.image_std)
    own = batch["pixel_values"]
    assert inputs["pixel_values"].shape == own.shape
    assert (inputs["pixel_values"] - own).abs().max() < 5 * eight_bits
    processor.image_processor = AutoImageProcessor.from_pretrained(saved[0], backend="pil")
    torch.testing.assert_close(prepared()["pixel_values"], own, rtol=0, atol=1e-6)
    prm.model(**inputs)
