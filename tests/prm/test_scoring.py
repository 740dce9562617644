from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prm.aggregations import mean
from prm.models.model import PRM, step_logits
from prm.scoring import aggregate, score_examples, step_scores
from tests.prm.tiny import SYSTEM, example, internvl, parameters, qwen, save_image


@pytest.fixture
def prm():
    return internvl()


@pytest.fixture
def examples(tmp_path):
    wide = save_image(tmp_path / "wide.png", 100, 60, seed=1)
    return [example(f"{place}", 1 + place % 5, (wide,) * (place % 3)) for place in range(7)]


@pytest.mark.parametrize("full_vocab", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_come_back_in_order(prm, examples, batch_size, full_vocab):
    collator = prm.collator(system_prompt=SYSTEM)
    params = {name: value + 0.05 for name, value in parameters(prm).items()}
    encoded = [collator.encode(item) for item in examples]
    scores = score_examples(prm, params, encoded, collator, batch_size, full_vocab=full_vocab)
    assert [len(row) for row in scores] == [len(item.steps) for item in examples]
    for row, item in zip(scores, examples, strict=True):
        logits = step_logits(prm, params, collator([item]), full_vocab=full_vocab)
        expected = step_scores(logits, full_vocab=full_vocab)[0]
        torch.testing.assert_close(row, expected.detach(), rtol=0, atol=1e-10)
        assert not row.requires_grad


def test_batches_are_of_similar_length(prm, examples):
    collator = prm.collator(system_prompt=SYSTEM)
    encoded = [collator.encode(item) for item in examples]
    lengths = []

    def recording(rows):
        lengths.append([len(row.input_ids) for row in rows])
        return collator(rows)

    score_examples(prm, {}, encoded, recording, 2)
    flat = [length for rows in lengths for length in rows]
    assert flat == sorted(flat, reverse=True)


def test_nothing_to_score(prm):
    assert score_examples(prm, {}, [], prm.collator(), 4) == []
    with pytest.raises(ValueError, match="batch_size >= 1, found 0"):
        score_examples(prm, {}, [], prm.collator(), 0)


def test_aggregate_checks_shapes():
    with pytest.raises(ValueError, match=r"found \(2, 3\) and \(2, 1\)"):
        aggregate(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool), mean)
    assert aggregate(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2).bool(), mean).tolist() == [0.5]


@pytest.mark.parametrize("full_vocab", [False, True])
def test_one_pass_per_solution_equals_one_per_prefix(prm, examples, full_vocab):
    collator = prm.collator(system_prompt=SYSTEM)
    at_once = score_examples(
        prm, {}, [collator.encode(item) for item in examples], collator, 4, full_vocab=full_vocab
    )
    for item, scores in zip(examples, at_once, strict=True):
        prefixes = [replace(item, steps=item.steps[: end + 1]) for end in range(len(item.steps))]
        encoded = [collator.encode(prefix) for prefix in prefixes]
        each = score_examples(prm, {}, encoded, collator, 1, full_vocab=full_vocab)
        ends = torch.stack([row[-1] for row in each])
        torch.testing.assert_close(scores, ends, rtol=0, atol=1e-12)


def original_scores(prm: PRM, example, collator) -> torch.Tensor:
    """As DreamPRM-1.5 scores: every logit of every token, softmax over the vocabulary, picked."""
    encoded = collator.encode(example)
    batch = collator([encoded])
    inputs = ("input_ids", "attention_mask", "pixel_values")
    with torch.no_grad():
        logits = prm.model(**{name: batch[name] for name in inputs if name in batch}).logits
    probs = torch.softmax(logits, dim=-1)
    return probs[0, encoded.label_positions, prm.plus_id]


@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_probabilities_are_the_originals(examples, tied):
    prm = internvl(tied=tied)
    collator = prm.collator(system_prompt=SYSTEM)
    encoded = [collator.encode(item) for item in examples]
    ours = score_examples(prm, {}, encoded, collator, 3, full_vocab=True)
    two_way = score_examples(prm, {}, encoded, collator, 3)
    for item, scores, other in zip(examples, ours, two_way, strict=True):
        theirs = original_scores(prm, item, collator)
        torch.testing.assert_close(scores, theirs, rtol=0, atol=1e-12)
        assert (other > scores).all()  # "+" and "-" share less than all of the probability


@pytest.mark.parametrize("make", [internvl, qwen])
def test_two_rows_of_the_head_say_what_the_whole_head_says(make, examples):
    prm = make()
    texts = [replace(item, images=()) for item in examples] if make is qwen else examples
    batch = prm.collator(system_prompt=SYSTEM)(texts)
    params = {name: value + 0.05 for name, value in parameters(prm).items()}
    whole = step_logits(prm, params, batch)
    torch.testing.assert_close(
        step_logits(prm, params, batch, label_rows=True), whole, rtol=0, atol=1e-12
    )
    with pytest.raises(ValueError, match="leaves out the vocabulary"):
        step_logits(prm, params, batch, full_vocab=True, label_rows=True)


def test_two_rows_are_multiplied_in_float32(examples):
    prm = internvl(dtype=torch.bfloat16)
    batch = prm.collator(system_prompt=SYSTEM)(examples)
    fine = step_logits(prm, {}, batch, label_rows=True)
    coarse = step_logits(prm, {}, batch)
    assert fine.dtype == coarse.dtype == torch.float32
    assert torch.equal(coarse, coarse.bfloat16().float())
    assert not torch.equal(fine, coarse)
    torch.testing.assert_close(fine.bfloat16().float(), coarse, rtol=2**-7, atol=2**-7)


def test_float32_batches_equal_single_examples(examples):
    prm = internvl(dtype=torch.float32)
    collator = prm.collator(system_prompt=SYSTEM)
    encoded = [collator.encode(item) for item in examples]
    batched = score_examples(prm, {}, encoded, collator, 7)
    single = score_examples(prm, {}, encoded, collator, 1)
    assert all(row.dtype == torch.float32 for row in batched)
    torch.testing.assert_close(torch.cat(batched), torch.cat(single), rtol=0, atol=2e-6)
