from __future__ import annotations

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from prm.losses import step_cross_entropy
from prm.models.model import load_prm, make_prm, save_prm, split_parameters, step_logits
from prm.schema import StepExample
from prm.scoring import step_scores
from tests.prm.tiny import (
    FORWARD_MODE,
    SYSTEM,
    byte_tokenizer,
    example,
    image_processor,
    internvl,
    parameters,
    qwen,
    qwen2_tokenizer,
    save_image,
    word_tokenizer,
)

EXACT = {"rtol": 0, "atol": 1e-10}  # float64, logits of order 1 to 10


@pytest.fixture
def mixed(tmp_path):
    wide = save_image(tmp_path / "wide.png", 100, 60, seed=1)
    tall = save_image(tmp_path / "tall.png", 50, 200, seed=2)
    return [
        example("a", 3, (wide,)),
        example("b", 2),
        example("c", 5, (wide, tall)),
        example("d", 1, (wide,)),
    ]


def reference_logits(prm, collator, item: StepExample) -> torch.Tensor:
    """One plain forward per step prefix: the answer that generation would start with."""
    rows = []
    for count in range(1, len(item.steps) + 1):
        prefix = StepExample(item.id, item.question, item.images, item.steps[:count])
        batch = collator([prefix])
        inputs = {
            name: batch[name]
            for name in ("input_ids", "attention_mask", "pixel_values")
            if name in batch
        }
        rows.append(prm.model(**inputs).logits[0, -1, [prm.plus_id, prm.minus_id]])
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [word_tokenizer, byte_tokenizer])
@pytest.mark.parametrize("context", ["plus", "gold", "masked"])
def test_batch_equals_one_plain_forward_per_step(mixed, attention, make, context):
    prm = internvl(make(), attention=attention)
    collator = prm.collator(system_prompt=SYSTEM, context=context)
    logits = step_logits(prm, {}, collator(mixed))
    assert logits.shape == (4, 5, 2)
    assert logits.isfinite().all()
    for row, item in zip(logits, mixed, strict=True):
        expected = reference_logits(prm, collator, item)
        torch.testing.assert_close(row[: len(item.steps)], expected, **EXACT)


def test_float32_batch_equals_single(mixed):
    prm = internvl(dtype=torch.float32)
    collator = prm.collator(system_prompt=SYSTEM)
    batched = step_scores(step_logits(prm, {}, collator(mixed)))
    for place, item in enumerate(mixed):
        alone = step_scores(step_logits(prm, {}, collator([item])))[0]
        torch.testing.assert_close(batched[place, : len(alone)], alone, rtol=0, atol=1e-5)


def test_half_precision_is_scored_in_float32(mixed):
    prm = internvl(dtype=torch.bfloat16)
    assert step_logits(prm, {}, prm.collator(system_prompt=SYSTEM)(mixed)).dtype == torch.float32


def test_order_of_rows_and_more_padding_do_not_matter(mixed):
    prm = internvl()
    collator = prm.collator(system_prompt=SYSTEM)
    forward = step_logits(prm, {}, collator(mixed))
    backward = step_logits(prm, {}, collator(mixed[::-1])).flip(0)
    torch.testing.assert_close(forward, backward, **EXACT)
    batch = collator(mixed)
    pad = prm.tokenizer.pad_token_id
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 17), value=pad)
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 17))
    torch.testing.assert_close(step_logits(prm, {}, batch), forward, **EXACT)
    batch["input_ids"][batch["attention_mask"] == 0] = prm.plus_id  # what padding says is unread
    torch.testing.assert_close(step_logits(prm, {}, batch), forward, **EXACT)


def test_later_steps_do_not_change_earlier_scores(mixed):
    prm = internvl()
    collator = prm.collator(system_prompt=SYSTEM)
    item = mixed[2]
    shorter = StepExample("s", item.question, item.images, item.steps[:2])
    logits = step_logits(prm, {}, collator([item, shorter]))
    torch.testing.assert_close(logits[0, :2], logits[1, :2], **EXACT)


def test_each_row_sees_its_own_images(mixed):
    prm = internvl()
    collator = prm.collator(system_prompt=SYSTEM)
    before = step_logits(prm, {}, collator(mixed))
    save_image(mixed[2].images[1], 50, 200, seed=9)  # the second image of row 2
    after = step_logits(prm, {}, prm.collator(system_prompt=SYSTEM)(mixed))
    changed = (before - after).abs().amax(-1) > 1e-6
    assert changed[2].all()
    assert not changed[[0, 1, 3]].any()
    swapped = [StepExample("c", item.question, item.images[::-1], item.steps) for item in mixed]
    assert not torch.allclose(after[2], step_logits(prm, {}, collator(swapped))[2])


def test_full_vocabulary_equals_log_softmax_of_a_plain_forward(mixed):
    prm = internvl()
    batch = prm.collator(system_prompt=SYSTEM)(mixed)
    logits = step_logits(prm, {}, batch, full_vocab=True)
    whole = prm.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"],
    ).logits.log_softmax(-1)
    for row in range(len(mixed)):
        for step, position in enumerate(batch["label_positions"][row].tolist()):
            expected = whole[row, position, [prm.plus_id, prm.minus_id]]
            torch.testing.assert_close(logits[row, step], expected, **EXACT)
    two_way = step_scores(step_logits(prm, {}, batch))
    torch.testing.assert_close(step_scores(logits), two_way, **EXACT)
    assert (step_scores(logits, full_vocab=True) < two_way).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [internvl, qwen])
def test_gradients_equal_those_of_the_module(mixed, make, tied):
    prm = make(tied=tied)
    items = [item for item in mixed if make is internvl or not item.images]
    batch = prm.collator(system_prompt=SYSTEM)(items)
    params = parameters(prm)
    assert ("lm_head.weight" in params) == (not tied)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return step_cross_entropy(logits, batch["labels"], batch["step_mask"]).sum()

    gradients = torch.autograd.grad(loss(step_logits(prm, params, batch)), list(params.values()))
    assert all(parameter.grad is None for parameter in prm.model.parameters())
    prm.model.requires_grad_(True)
    inputs = ("input_ids", "attention_mask", "pixel_values")
    logits = prm.model(**{name: batch[name] for name in inputs if name in batch}).logits
    rows = torch.arange(len(items))[:, None]
    read = logits[rows, batch["label_positions"]][..., [prm.plus_id, prm.minus_id]]
    loss(read).backward()
    for (name, parameter), gradient in zip(prm.model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().sum() > 0 or "k_proj.bias" in name or "key" in name, name


def test_tied_gradient_is_the_sum_of_the_untied_ones():
    tied, untied = qwen(tied=True), qwen()
    batch = tied.collator(system_prompt=SYSTEM)([example(steps=2)])
    untied.model.load_state_dict(tied.model.state_dict())

    def gradients(prm, names):
        params = parameters(prm)
        logits = step_logits(prm, params, batch)
        loss = step_cross_entropy(logits, batch["labels"], batch["step_mask"]).sum()
        return torch.autograd.grad(loss, [params[name] for name in names])

    (shared,) = gradients(tied, ["model.embed_tokens.weight"])
    embedding, head = gradients(untied, ["model.embed_tokens.weight", "lm_head.weight"])
    assert embedding.abs().sum() > 0
    assert head.abs().sum() > 0
    torch.testing.assert_close(shared, embedding + head)


def test_parameters_that_are_not_passed_keep_the_model_s_values(mixed):
    prm = internvl()
    batch = prm.collator(system_prompt=SYSTEM)(mixed)
    trainable, frozen = split_parameters(prm.model, ["vision_tower"])
    moved = {name: value + 0.01 for name, value in trainable.items()}
    partly = step_logits(prm, moved, batch)
    torch.testing.assert_close(partly, step_logits(prm, {**frozen, **moved}, batch), rtol=0, atol=0)
    before = step_logits(prm, {}, batch)
    assert not torch.allclose(partly, before)
    with pytest.raises(Exception, match="no_such"):
        step_logits(prm, {"no_such.weight": torch.zeros(1)}, batch)


def test_training_mode_is_left_as_it_is(mixed):
    prm = internvl()
    assert not prm.model.training
    batch = prm.collator(system_prompt=SYSTEM)(mixed)
    for mode in (True, False):
        prm.model.train(mode)
        step_logits(prm, {}, batch)
        assert {module.training for module in prm.model.modules()} == {mode}


def test_one_forward_and_the_head_only_at_the_steps(mixed):
    prm = internvl()
    batch = prm.collator(system_prompt=SYSTEM)(mixed)
    shapes = []
    hooks = [
        prm.model.model.register_forward_hook(lambda *_: shapes.append("base")),
        prm.model.lm_head.register_forward_hook(
            lambda _, inputs, output: shapes.append((inputs[0].shape, output.shape))
        ),
    ]
    step_logits(prm, {}, batch)
    for hook in hooks:
        hook.remove()
    assert shapes == ["base", ((4, 5, 32), (4, 5, len(prm.tokenizer)))]


@pytest.mark.parametrize("tied", [False, True])
def test_split_parameters(tied):
    model = internvl(tied=tied).model
    trainable, frozen = split_parameters(model, ["vision_tower", "language_model.layers.0"])
    assert all("vision_tower." in name or "language_model.layers.0." in name for name in frozen)
    assert "model.language_model.layers.1.mlp.up_proj.weight" in trainable
    assert "model.multi_modal_projector.linear_1.weight" in trainable
    assert {**trainable, **frozen}.keys() == dict(model.named_parameters()).keys()
    values = [*trainable.values(), *frozen.values()]
    assert len({value.data_ptr() for value in values}) == len(values)
    assert not any(value.requires_grad for value in values)
    nothing_frozen = split_parameters(model)
    assert len(nothing_frozen[0]) == len(values)
    assert nothing_frozen[1] == {}


def test_a_tied_tensor_is_frozen_under_any_of_its_names():
    name = "model.language_model.embed_tokens.weight"
    for freeze in (["lm_head"], ["embed_tokens"]):
        trainable, frozen = split_parameters(internvl(tied=True).model, freeze)
        assert list(frozen) == [name]
        assert name not in trainable


def test_split_refuses_names_of_nothing():
    with pytest.raises(
        ValueError, match=r"found 'vision'; its parts are lm_head, model\.language_model"
    ):
        split_parameters(internvl().model, ["vision_tower", "vision"])


@pytest.mark.parametrize("tied", [False, True])
def test_saved_model_scores_the_same(tmp_path, mixed, tied):
    prm = internvl(tied=tied)
    collator = prm.collator(system_prompt=SYSTEM, max_patches=5)
    batch = collator(mixed)
    generator = torch.Generator().manual_seed(1)
    params = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in split_parameters(prm.model)[0].items()
    }
    before = step_logits(prm, {}, batch)
    expected = step_logits(prm, params, batch)
    save_prm(prm, params, tmp_path / "model")
    torch.testing.assert_close(step_logits(prm, {}, batch), before, rtol=0, atol=0)
    loaded = load_prm(tmp_path / "model", dtype=torch.float64)
    again = loaded.collator(system_prompt=SYSTEM, max_patches=5)(mixed)
    torch.testing.assert_close(again, batch, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(step_logits(loaded, {}, again), expected, rtol=0, atol=0)
    assert list(tmp_path.glob(".*")) == []

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert type(model) is type(prm.model)
    assert model.dtype == torch.float64
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == prm.tokenizer.chat_template
    assert tokenizer.context_image_token == "<IMG_CONTEXT>"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    assert processor.size == prm.image_processor.size


def test_text_only_model_round_trip(tmp_path):
    prm = qwen(qwen2_tokenizer())
    save_prm(prm, {}, tmp_path / "model")
    loaded = load_prm(tmp_path / "model", dtype=torch.float64, attn_implementation="eager")
    assert loaded.image_processor is None
    assert loaded.model.config._attn_implementation == "eager"
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    items = [example("a", 3), example("b", 5)]
    logits = [step_logits(x, {}, x.collator(system_prompt=SYSTEM)(items)) for x in (prm, loaded)]
    # Eager attention takes its softmax in float32 whatever the dtype, fused attention does not.
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_float32_is_the_default_when_loading(tmp_path):
    save_prm(qwen(qwen2_tokenizer(), dtype=torch.bfloat16), {}, tmp_path / "model")
    assert load_prm(tmp_path / "model").model.dtype == torch.float32
    assert load_prm(str(tmp_path / "model"), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_saving_refuses_to_overwrite_and_unknown_names(tmp_path):
    prm = internvl()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        save_prm(prm, {}, tmp_path / "full")
    with pytest.raises(ValueError, match=r"found 'no_such\.weight'"):
        save_prm(prm, {"no_such.weight": torch.zeros(1)}, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    save_prm(prm, {}, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_saving_refuses_a_tokenizer_that_would_load_back_as_another(tmp_path):
    with pytest.raises(ValueError, match="from_pretrained makes a Qwen2Tokenizer of it"):
        save_prm(qwen(word_tokenizer()), {}, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_loading_refuses_paths_that_do_not_exist(tmp_path):
    for name in (tmp_path / "none", "./none", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match="found nothing there"):
            load_prm(name)


def test_models_that_do_more_than_their_head_are_refused():
    prm = qwen()

    class Scaled(type(prm.model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

    prm.model.__class__ = Scaled
    with pytest.raises(ValueError, match="changes them further"):
        make_prm(prm.model, prm.tokenizer)


@FORWARD_MODE
def test_functional_call_inside_transforms(mixed):
    """The jvp route of hypergradients differentiates through the whole call."""
    prm = internvl(attention="eager")
    batch = prm.collator(system_prompt=SYSTEM)([mixed[0], mixed[1]])
    params = {name: value.detach() for name, value in prm.model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    tangents = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in params.items()
    }

    def logits(values):
        return step_logits(prm, values, batch)

    _, slope = torch.func.jvp(logits, (params,), (tangents,))
    # Reverse mode as the oracle: transformers computes norms and rotary angles in float32, which
    # leaves central differences only four digits.
    leaves = parameters(prm)
    expected = [
        sum(
            (gradient * tangents[name]).sum()
            for name, gradient in zip(
                leaves,
                torch.autograd.grad(value, list(leaves.values()), retain_graph=True),
                strict=True,
            )
        )
        for value in logits(leaves).flatten()
    ]
    torch.testing.assert_close(slope.flatten(), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_image_processor_is_needed_with_its_tokens():
    prm = internvl()
    assert prm.image_tokens is not None
    assert prm.image_tokens.per_tile == 4
    tokenizer = qwen().tokenizer
    with pytest.raises(ValueError, match="image_seq_length"):
        make_prm(qwen().model, tokenizer, image_processor())


@pytest.mark.parametrize(
    "name", ["runs/typo/model", "runs/model", "model", "runs/../x", "", "a b/c", "org/", "C:/x/y"]
)
def test_a_path_that_is_not_there_never_reaches_the_network(tmp_path, monkeypatch, name):
    """Also where it is written like a name on a hub: a folder of its first part is here."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prm.models.model.load_config", lambda name: pytest.fail("looked it up"))
    with pytest.raises(FileNotFoundError, match="organisation/model"):
        load_prm(name)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="found a file"):
        load_prm(str(tmp_path / "model.safetensors"))


def test_a_name_on_a_hub_is_looked_up_there(tmp_path, monkeypatch):
    looked = []

    def refuse(name: str) -> None:
        looked.append(name)
        raise OSError("no network in tests")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prm.models.model.load_config", refuse)
    with pytest.raises(OSError, match="no network"):
        load_prm("OpenGVLab/InternVL3-1B-hf")
    assert looked == ["OpenGVLab/InternVL3-1B-hf"]
