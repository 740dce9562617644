"""Trees of solutions: what each computes alone, in fewer tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prm.batches import prefix_trees
from prm.batches.passes import passes_of
from prm.batches.prefix_trees import prefix_groups, question_batch, tree_batch
from prm.inputs.collate import EncodedExample
from prm.inputs.tokens import ImageTokens
from prm.models.model import split_parameters, step_logits, tree_width
from prm.schema import Step, StepExample
from prm.scoring import score_examples, score_part
from tests.prm.tiny import SYSTEM, in_float64, internvl, llama, qwen, qwen2_vl, save_image

MODELS = {"internvl": internvl, "qwen": qwen, "llama": llama}


def solution(name, question, texts, images=()) -> StepExample:
    steps = tuple(Step(text, 1.0) for text in texts.split("/"))
    return StepExample(id=name, question=question, images=images, steps=steps, correct=True)


@pytest.fixture
def candidates(tmp_path) -> list[StepExample]:
    """Of two questions, not in order: equal, a part of another, with and without common steps."""
    first, second = (save_image(tmp_path / f"{n}.png", 60 + 50 * n, 60, seed=n) for n in (0, 1))
    texts = ["one/two/three", "one/two/four", "two", "one/two/three", "one", "five/one two/two"]
    sees = [solution(f"a{n}", "what is one", text, (first, second)) for n, text in enumerate(texts)]
    reads = [solution(f"b{n}", "what is two", text) for n, text in enumerate(texts[1:])]
    other = [solution("c", "what is one", "one/two/three", (second, first))]
    return [item for pair in zip(sees[:5], reads, strict=True) for item in pair] + sees[5:] + other


def encoded_by(prm, examples) -> list[EncodedExample]:
    collator = prm.collator(system_prompt=SYSTEM)
    if prm.image_tokens is None:
        examples = [replace(item, images=()) for item in examples]
    return [collator.encode(item) for item in examples]


def groups_of(prm, rows) -> list[tuple[list[int], int]]:
    return prefix_groups(rows, prm.image_tokens, prm.tree_width)


@pytest.mark.parametrize("kind", MODELS)
def test_a_tree_has_the_logits_and_gradients_of_its_sequences(candidates, kind, monkeypatch):
    prm = in_float64(MODELS[kind](), monkeypatch)
    collator = prm.collator(system_prompt=SYSTEM)
    rows = encoded_by(prm, candidates)
    groups = groups_of(prm, rows)
    assert sorted(number for numbers, _ in groups for number in numbers) == [*range(len(rows))]
    assert max(len(numbers) for numbers, _ in groups) >= 4
    batch = tree_batch(collator, rows, [numbers for numbers, _ in groups])
    params, _ = split_parameters(prm.model)
    params = {name: (value + 0.05).requires_grad_() for name, value in params.items()}
    padded = collator(rows)
    for name in ("step_mask", "labels", "correct"):
        torch.testing.assert_close(batch[name], padded[name], rtol=0, atol=0, equal_nan=True)
    mask = padded["step_mask"]
    values, gradients = [], []
    for inputs in (batch, padded):
        logits = step_logits(prm, params, inputs)
        values.append(logits[mask])
        loss = (logits[mask] * torch.arange(int(mask.sum()) * 2).view(-1, 2)).square().sum()
        gradients.append(torch.autograd.grad(loss, list(params.values()), allow_unused=True))
    torch.testing.assert_close(*values, rtol=0, atol=1e-10)
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-10 * (1 + other.norm())


@pytest.mark.parametrize("kind", MODELS)
def test_a_tree_has_each_common_beginning_once(candidates, kind):
    prm = MODELS[kind]()
    rows = encoded_by(prm, candidates)
    for numbers, nodes in groups_of(prm, rows):
        tokens = [rows[number].input_ids.tolist() for number in numbers]
        beginnings = {tuple(row[: end + 1]) for row in tokens for end in range(len(row))}
        assert nodes == len(beginnings)
        if len(numbers) > 1:
            batch = tree_batch(prm.collator(), rows, [numbers])
            assert batch["input_ids"].shape == (1, nodes)
            assert batch["attention_mask"].sum() == sum(len(one) for one in beginnings)


def row(tokens, question="q", images=()) -> EncodedExample:
    ids = torch.tensor(tokens, dtype=torch.int32)
    example = StepExample(id="x", question=question, images=images, steps=(Step("s", None),))
    return EncodedExample(example, ids, torch.tensor([len(ids) - 1]), (1,) * len(images))


def test_a_sequence_joins_where_that_saves_operations():
    rows = [row([1, *range(10, 30)]), row([1, *range(40, 60)])]
    # 41² - 21² - 21² = 799 pairs more, for one token less: 6w > 799
    assert len(prefix_groups(rows, None, 133)) == 2
    assert prefix_groups(rows, None, 134) == [([0, 1], 41)]


def test_what_keeps_sequences_apart():
    def apart(*rows, picture=None, most=8):
        tokens = None if picture is None else ImageTokens("", "", "", picture, 1)
        return [numbers for numbers, _ in prefix_groups(list(rows), tokens, 999, most=most)]

    common = [1, 2, 3, 4]
    assert apart(row([*common, 5]), row([*common, 6])) == [[0, 1]]
    assert apart(row([*common, 5], "q"), row([*common, 6], "p")) == [[0], [1]]
    assert apart(row(common, images=("a",)), row(common, images=("b",))) == [[0], [1]]
    assert apart(row([*common, 7, 5]), row([*common, 7, 6]), picture=7) == [[0, 1]]
    assert apart(row([*common, 5, 7]), row([*common, 6, 7]), picture=7) == [[0], [1]]
    assert apart(*(row([*common, n]) for n in range(9)), most=4) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8],
    ]
    assert apart(row([5, 6]), row([6, 5])) == [[0], [1]]


def test_a_tree_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(prefix_trees, "MOST_NODES", 6)
    rows = [row([1, 2, 3, 4, number]) for number in range(5, 9)]
    assert prefix_groups(rows, None, 999) == [([0, 1], 6), ([2, 3], 6)]
    assert prefix_groups(rows, None, 999, room=[9, 9, 5, 9]) == [([n], 5) for n in range(4)]


def test_models_that_take_trees():
    for make in MODELS.values():
        assert make().tree_width == 32
        assert make(attention="eager").tree_width is None
    assert qwen2_vl().tree_width is None
    sliding = qwen().model.config
    sliding.layer_types = ["full_attention", "sliding_attention"]
    assert tree_width(sliding) is None


@pytest.mark.parametrize("limit", [None, 60])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_by_trees_are_those_of_sequences(candidates, batch_size, limit):
    prm = internvl()
    collator = prm.collator(system_prompt=SYSTEM)
    rows = encoded_by(prm, candidates)
    scored: list[int] = []
    given = (prm, {}, rows)
    found = score_examples(
        *given, collator, batch_size, tokens_per_batch=limit, scored=scored.append
    )
    plain = score_examples(*given, lambda part: collator(part), batch_size, tokens_per_batch=limit)
    assert sum(scored) == len(rows)
    assert max(scored) <= batch_size
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    parts = [
        score_part(*given, collator, batch_size, part=part, parts=2, tokens_per_batch=limit)
        for part in (0, 1)
    ]
    for number, scores in enumerate(found):
        assert sum(number in part.rows for part in parts) == 1
        assert any(torch.equal(part[number], scores) for part in parts)


def test_passes_count_tokens_of_trees_and_of_their_pictures_once(candidates):
    prm = internvl()
    rows = encoded_by(prm, candidates)

    def planned(limit, tile_tokens=0):
        options = {"tile_tokens": tile_tokens, "width": 32, "image_tokens": prm.image_tokens}
        plan = passes_of(rows, 64, limit, **options)
        assert plan.steps == [len(row.label_positions) for row in rows]
        assert sorted(row for one in plan.passes for row in one.rows) == [*range(len(rows))]
        return [(one.trees, [len(group) for group in one.groups]) for one in plan.passes]

    nodes = sorted((count for numbers, count in groups_of(prm, rows) if len(numbers) > 1))
    tiles = sum(rows[0].tile_counts)
    assert planned(None) == [(False, [1]), (True, [6, 5])]
    assert planned(2 * nodes[1]) == [(False, [1]), (True, [6, 5])]
    assert planned(2 * nodes[1] - 1) == [(False, [1]), (True, [6]), (True, [5])]
    assert planned(2 * nodes[1] + 16 * tiles, 16)[1:] == [(True, [6, 5])]
    assert planned(2 * nodes[1] + 16 * tiles - 1, 16)[1:] == [(True, [6]), (True, [5])]
    limit = nodes[1] + 16 * tiles
    assert [groups for trees, groups in planned(limit, 16) if trees] == [[6], [5]]
    # One less, and the sixth of the largest tree does not fit beside its pictures.
    assert [groups for trees, groups in planned(limit - 1, 16) if trees] == [[5], [5]]
    assert [groups for trees, groups in planned(limit - 1, 16) if not trees] == [[1], [1]]


def test_a_batch_of_questions_is_of_trees_where_these_are_smaller(candidates):
    prm = internvl()
    collator = prm.collator(system_prompt=SYSTEM, index={item.id: 7 for item in candidates})
    rows = [collator.encode(item) for item in candidates]
    batch = question_batch(collator, rows, 32)
    groups = groups_of(prm, rows)
    assert batch["input_ids"].shape == (len(groups), max(nodes for _, nodes in groups))
    assert batch["index"].tolist() == [7] * len(rows)
    expected = step_logits(prm, {}, collator(rows))[batch["step_mask"]]
    found = step_logits(prm, {}, batch)[batch["step_mask"]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    alone = [rows[0], rows[1], rows[-1]]  # nothing in common
    assert question_batch(collator, alone, 32)["label_positions"].shape == (3, 3)
