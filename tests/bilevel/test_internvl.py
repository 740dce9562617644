"""A tiny InternVL of transformers, as it is: taps against forward mode and a loop."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional
from transformers import InternVLConfig, InternVLForConditionalGeneration

from bilevel import (
    AdamW,
    Auto,
    CentralDifference,
    Ghost,
    Jvp,
    OneStep,
    PerExample,
    Reverse,
    ReweightingProblem,
    Unrolled,
    tree,
)
from bilevel.autodiff.gradient import upper_gradient
from tests.bilevel.comparing import relative
from tests.bilevel.run_window import run_step, run_window
from tests.oracles import per_example_gradients, random_like

VOCAB, IMAGE_TOKEN, STEPS = 100, 99, 24
TILES = [1, 2, 0, 3]
# The model computes its norms and softmaxes in float32 whatever its parameters are.
LIMIT = 1e-6


def internvl(attention: str) -> InternVLForConditionalGeneration:
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": (28, 28),
            "patch_size": (7, 7),
            "attention_bias": True,
            "use_mean_pooling": True,
            "hidden_dropout_prob": 0.1,
        },
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return InternVLForConditionalGeneration(config).double().train()


def batch_of(tiles: list[int]) -> dict[str, torch.Tensor]:
    size = len(tiles)
    ids = torch.randint(0, IMAGE_TOKEN, (size, STEPS))
    for row, count in enumerate(tiles):
        ids[row, 1 : 1 + 4 * count] = IMAGE_TOKEN
    mask = torch.ones(size, STEPS, dtype=torch.int64)
    mask[0, -3:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(sum(tiles), 3, 28, 28, dtype=torch.float64),
        "owner": torch.arange(size).repeat_interleave(torch.tensor(tiles)),
        "labels": torch.randint(0, 2, (size, 2)),
        "index": torch.arange(size),
    }


def setting(attention: str, frozen: str | None):
    torch.manual_seed(2)
    model = internvl(attention)
    everything = {name: leaf.detach() for name, leaf in model.named_parameters()}
    params = {n: leaf for n, leaf in everything.items() if frozen is None or frozen not in n}
    held = {name: leaf for name, leaf in everything.items() if name not in params}

    def per_example_loss(lower, batch):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
        kept = torch.tensor([STEPS - 8, STEPS - 4])
        output = functional_call(
            model, {**held, **lower}, kwargs={**inputs, "logits_to_keep": kept, "use_cache": False}
        )
        logits = output.logits[..., 10:12]
        losses = functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        return losses.mean(1), None

    problem = ReweightingProblem(
        per_example_loss,
        lambda upper, batch, features: upper[batch["index"]],
        lambda lower, upper, batch: per_example_loss(lower, batch)[0].square().mean(),
        rows=lambda batch: {len(batch["owner"]): batch["owner"]},
    )
    return problem, params, batch_of(TILES), batch_of([1, 1, 2, 1])


@pytest.mark.parametrize("frozen", [None, "vision_tower"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_routes_agree_on_internvl(attention, frozen):
    problem, params, batch, upper_batch = setting(attention, frozen)
    upper = torch.tensor([1.5, 0.0, 0.7, 1.0], dtype=torch.float64)
    optimizer = AdamW(1e-3, eps=1e-4)
    _, state = optimizer.update(random_like(params, 0), optimizer.init(params), params)

    def run(route, order):
        torch.manual_seed(4)
        return run_step(
            OneStep(route, order), problem, optimizer, params, upper, state, [batch], upper_batch
        )

    torch.manual_seed(4)
    examples = per_example_gradients(problem, params, batch, torch.get_rng_state())
    mean = tree.scale(
        1 / 4,
        {
            name: sum(w * example[name] for w, example in zip(upper, examples, strict=True))
            for name in params
        },
    )
    for order, routes in (
        ("upper-first", (Ghost(), Auto(), Jvp())),
        ("lower-first", (PerExample(), PerExample(0), Auto(), Jvp(), Reverse())),
    ):
        first = run(routes[0], order)
        assert relative(first.passed.grads, mean) <= LIMIT
        at = params if order == "upper-first" else first.lower_params
        torch.manual_seed(4)  # the step hands its random state to the upper pass too
        v = upper_gradient(problem, at, upper, upper_batch).lower
        if order == "upper-first":
            assert first.upper.lower is None
            mu = optimizer.predicted_grads_vjp(state, params, v)
        else:
            mu = optimizer.grads_vjp(first.passed.grads, state, params, v)
        loop = torch.stack([tree.vdot(example, mu) for example in examples]) / 4
        assert loop.abs().min() > 0.0
        for route in routes:
            result = run(route, order)
            assert result.passed.micro_batches[0].note is None
            assert relative(result.hypergradient, loop) <= LIMIT, (route, order)
    # float32 inside the model leaves differences only a few digits.
    assert relative(run(CentralDifference(1e-2), "lower-first").hypergradient, loop) < 0.1


def test_every_parameter_gets_a_gradient():
    problem, params, batch, upper_batch = setting("sdpa", None)
    optimizer = AdamW(1e-3)
    result = run_step(
        OneStep(Ghost(), "upper-first"),
        problem,
        optimizer,
        params,
        torch.ones(4).double(),
        optimizer.init(params),
        [batch],
        upper_batch,
    )
    without = {name for name, gradient in result.passed.grads.items() if gradient is None}
    assert without == {"model.vision_tower.embeddings.mask_token"} & set(params)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_three_steps_unrolled_on_internvl(attention):
    """Forward over reverse with dropout against double backward."""
    problem, params, batch, upper_batch = setting(attention, None)
    upper = torch.tensor([1.5, 0.0, 0.7, 1.0], dtype=torch.float64)
    optimizer = AdamW(1e-3, eps=1e-4)
    _, state = optimizer.update(random_like(params, 0), optimizer.init(params), params)

    def run(product):
        torch.manual_seed(4)
        return run_window(
            Unrolled(product=product),
            problem,
            optimizer,
            params,
            upper,
            state,
            [[batch], [upper_batch], [batch]],
            upper_batch,
        )

    forward, backward = run(Jvp()), run(Reverse())
    assert relative(forward.lower_params, backward.lower_params) == 0.0
    assert relative(forward.hypergradient, backward.hypergradient) <= LIMIT
