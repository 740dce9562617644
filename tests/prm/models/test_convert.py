"""Converted checkpoints say what the original said; what is not computed keeps its bits."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from prm.conventions import FILE, Conventions, write_conventions
from prm.models.convert import convert_internvl
from prm.models.internvl_layout import Layout
from prm.models.model import load_prm
from prm.models.untrusted import ModelError
from prm.schema import Step, StepExample
from tests.prm.models.original_checkpoint import make_original, state_of, write_original


@pytest.mark.parametrize(
    ("kind", "tied", "shards"),
    [("qwen2", False, 1), ("qwen2", False, 3), ("qwen2", True, 2), ("internlm2", False, 2)],
)
def test_logits_are_those_of_the_original(tmp_path, kind, tied, shards):
    config, model, tokenizer = make_original(kind, tied=tied)
    source = write_original(tmp_path / "old", config, state_of(model, tied=tied), tokenizer, shards)
    target = tmp_path / "new"
    written = convert_internvl(source, target)
    native = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float64)
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    ids = torch.randint(12, len(tokenizer), (1, 31), generator=torch.Generator().manual_seed(1))
    ids[0, 3:11] = image  # two tiles of four tokens
    pixels = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    expected = model(ids, pixels)
    found = native(input_ids=ids, pixel_values=pixels).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    distinct = {value.data_ptr(): value for value in model.parameters()}
    assert written["parameters"] == sum(value.numel() for value in distinct.values())
    assert sum(value.numel() for value in native.parameters()) == written["parameters"]


def test_a_converted_folder_judges_steps_with_an_image(tmp_path):
    config, model, tokenizer = make_original("qwen2")
    state = {name: value.to(torch.bfloat16) for name, value in state_of(model).items()}
    target = tmp_path / "new"
    source = write_original(tmp_path / "old", config, state, tokenizer)
    plus, minus = (tokenizer.convert_tokens_to_ids(label) for label in "+-")
    asked = Conventions(plus_id=plus, minus_id=minus, context="gold", max_patches=12)
    write_conventions(source / FILE, asked)
    convert_internvl(source, target)
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    prm = load_prm(target)
    assert prm.conventions == asked
    image = tmp_path / "image.png"
    Image.new("RGB", (112, 56), (200, 30, 30)).save(image)
    steps = (Step("one", 1.0), Step("two", 0.0))
    encoded = prm.collator().encode(StepExample("a", "what", (str(image),), steps))
    # Two tiles and the thumbnail, four tokens each.
    assert int((encoded.input_ids == prm.model.config.image_token_id).sum()) == 12
    assert len(encoded.label_positions) == 2


def test_bits_are_kept_and_fused_projections_taken_apart(tmp_path):
    config, model, tokenizer = make_original("qwen2")
    state = {name: value.to(torch.bfloat16) for name, value in state_of(model).items()}
    target = tmp_path / "new"
    convert_internvl(write_original(tmp_path / "old", config, state, tokenizer, 2), target)
    found: dict = {}
    for file in target.glob("*.safetensors"):
        found |= load_file(file)
    fused = state["vision_model.encoder.layers.1.attn.qkv.weight"]
    block = "model.vision_tower.encoder.layer.1."
    for place, side in enumerate("qkv"):
        assert torch.equal(found[f"{block}attention.{side}_proj.weight"], fused[place * 16 :][:16])
    for old, new in {
        "vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.cls_token",
        "vision_model.encoder.layers.1.ls1": block + "lambda_1",
        "vision_model.encoder.layers.1.ls2": block + "lambda_2",
        "vision_model.encoder.layers.1.norm2.bias": block + "layernorm_after.bias",
        "mlp1.0.weight": "model.multi_modal_projector.layer_norm.weight",
        "mlp1.3.bias": "model.multi_modal_projector.linear_2.bias",
        "language_model.model.norm.weight": "model.language_model.norm.weight",
        "language_model.lm_head.weight": "lm_head.weight",
    }.items():
        assert found[new].dtype == torch.bfloat16
        assert torch.equal(found[new], state[old])
    assert len(found) == len(state) + 2 * 2 * 2  # weight and bias of two layers, in three


def test_groups_of_internlm2():
    layout = Layout("internlm2", heads=4, key_value_heads=2)
    name = "language_model.model.layers.0.attention.wqkv.weight"
    # Rows named by what they are: queries 0 1 of group 0, its key 10, value 20; then group 1.
    rows = torch.tensor([0, 1, 10, 20, 2, 3, 11, 21]).repeat_interleave(2)[:, None]
    q, k, v = layout.native_tensors(name, rows)
    assert q[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert k[:, 0].tolist() == [10, 10, 11, 11]
    assert v[:, 0].tolist() == [20, 20, 21, 21]
    assert layout.native_shapes(name, (16, 1)) == ((8, 1), (4, 1), (4, 1))


def _changed(**change):
    def apply(config, state):
        config.update(change)

    return apply


def _text_changed(**change):
    def apply(config, state):
        config["llm_config"].update(change)

    return apply


def _without(name):
    def apply(config, state):
        del state[name]

    return apply


def _with(name, value):
    def apply(config, state):
        state[name] = value

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed(ps_version="v1"), r"expected ps_version 'v2', found 'v1'"),
        (_changed(template="Hermes-2"), r"expected template 'internvl2_5', found 'Hermes-2'"),
        (_changed(model_type="llava"), r"expected model_type 'internvl_chat', found 'llava'"),
        (_changed(force_image_size=448), r"expected force_image_size 56 .* found 448"),
        (_text_changed(model_type="phi3"), r"llm_config.model_type .* found 'phi3'"),
        (_without("mlp1.1.bias"), r"missing: model\.multi_modal_projector\.linear_1\.bias"),
        (_with("mlp1.2.weight", torch.ones(1)), r"original layout .* found 'mlp1\.2\.weight'"),
        (
            _with("vision_model.encoder.layers.7.ls1", torch.ones(16)),
            r"left over: model\.vision_tower\.encoder\.layer\.7\.lambda_1",
        ),
        (
            _with("mlp1.0.weight", torch.ones(16)),
            r"mlp1\.0\.weight: expected shape \(64,\) .* found \(16,\)",
        ),
        (
            _with("vision_model.encoder.layers.0.attn.qkv.bias", torch.ones(50)),
            r"expected shape \(16,\) for .*q_proj\.bias .* found \(17,\)",
        ),
        (_text_changed(tie_word_embeddings=True), r"the head is not the embedding"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(tmp_path, change, message):
    config, model, tokenizer = make_original("qwen2")
    state = state_of(model)
    change(config, state)
    source = write_original(tmp_path / "old", config, state, tokenizer)
    with pytest.raises(ValueError, match=message):
        convert_internvl(source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    config, model, tokenizer = make_original("qwen2")
    source = write_original(tmp_path / "old", config, state_of(model), tokenizer)
    save_file({"mlp1.1.bias": torch.zeros(32)}, source / "other.safetensors")
    with pytest.raises(ValueError, match=r"mlp1\.1\.bias is in model\.safetensors and in other"):
        convert_internvl(source, tmp_path / "new")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_files_are_named(tmp_path, name):
    config, model, tokenizer = make_original("qwen2")
    source = write_original(tmp_path / "old", config, state_of(model), tokenizer)
    (source / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace("model.", r"\*.")):
        convert_internvl(source, tmp_path / "new")


def test_a_full_target_is_left_alone(tmp_path):
    config, model, tokenizer = make_original("qwen2")
    source = write_original(tmp_path / "old", config, state_of(model), tokenizer)
    target = tmp_path / "new"
    target.mkdir()
    (target / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="not empty"):
        convert_internvl(source, target)
    assert [path.name for path in target.iterdir()] == ["mine"]


def _cut(folder):
    path = folder / "model-00002-of-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _written(name, text):
    return lambda folder: (folder / name).write_text(text)


def _config(change):
    def edit(folder):
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def _nan(folder):
    path = folder / "model-00001-of-2.safetensors"
    state = load_file(path)
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, path)


INDEX = "model.safetensors.index.json"
DAMAGE = {
    "cut shard": (_cut, r"model-00002-of-2\.safetensors: expected a complete safetensors file"),
    "index without weight_map": (_written(INDEX, "{}"), r"index\.json: weight_map: .* found none"),
    "index a list": (_written(INDEX, "[]"), r"index\.json: expected a JSON object, found list"),
    "index no JSON": (_written(INDEX, "{"), r"index\.json: expected JSON"),
    "shard above": (
        _written(INDEX, '{"weight_map": {"x": "../old/model-00001-of-2.safetensors"}}'),
        r"found '\.\./old/model-00001-of-2\.safetensors'; weights are never read from elsewhere",
    ),
    "NaN": (_nan, r"model-00001-of-2\.safetensors: \S+: expected finite weights"),
    "config null": (_written("config.json", "null"), r"config\.json: expected a JSON object"),
    "llm_config a string": (_config(lambda c: c.update(llm_config="qwen2")), r"config\.json can"),
    "no vision_config": (
        _config(lambda c: c.pop("vision_config")), r"config\.json .* 'vision_config' is missing",
    ),
    "no number of heads": (
        _config(lambda c: c["llm_config"].pop("num_attention_heads")),
        r"the entry 'num_attention_heads' is missing",
    ),
    "a word for a size": (
        _config(lambda c: c["llm_config"].update(hidden_size="x")), r"config\.json cannot be used",
    ),
    "10^7 layers": (
        _config(lambda c: c["llm_config"].update(num_hidden_layers=10**7)),
        r"config\.json: llm_config\.num_hidden_layers: expected at most 10000, found 10000000",
    ),
    "9000 layers": (
        _config(lambda c: c["llm_config"].update(num_hidden_layers=9000)), r"more than \d+ modules",
    ),
    "a vocabulary of 10^12": (
        _config(lambda c: c["llm_config"].update(vocab_size=10**12)), r"more than \d+ values",
    ),
    "patches of size 0": (
        _config(lambda c: c["vision_config"].update(patch_size=0)), r"config\.json cannot .* Zero",
    ),
    "10^9 tiles": (
        _config(lambda c: c.update(max_dynamic_patch=10**9)), r"max_dynamic_patch: expected 1 to",
    ),
    "tokenizer cut": (_written("tokenizer.json", '{"version": '), r"the tokenizer in .* cannot be"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_refused_in_a_sentence_and_nothing_is_written(tmp_path, name):
    change, message = DAMAGE[name]
    config, model, tokenizer = make_original("qwen2")
    source = write_original(tmp_path / "old", config, state_of(model), tokenizer, shards=2)
    change(source)
    with pytest.raises(ModelError, match=message) as caught:
        convert_internvl(source, tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_weights_in_pickles_are_refused(tmp_path):
    config, model, tokenizer = make_original("qwen2")
    source = write_original(tmp_path / "old", config, state_of(model), tokenizer)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"found pytorch_model\.bin, which may hold pickles"
    ):
        convert_internvl(source, tmp_path / "new")
