from __future__ import annotations

import pytest
import torch

from prm.aggregations import mean
from prm.model import step_logits
from prm.scoring import aggregate, score_examples, step_scores
from tests.prm.tiny import SYSTEM, example, internvl, parameters, save_image


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
