"""Which examples a step sees: a function of seed and step, counted in the visits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from recipes.options.parse import changed, train_options
from recipes.train.batches import (
    count_visits,
    epoch_order,
    lower_draw,
    lower_meta_draw,
    meta_batch,
    mixed_questions,
    per_step,
    train_batch,
    upper_draw,
)

OPTIONS = train_options(train_file="t", output_dir="o", batch_size=3, meta_batch_size=6)


@dataclass(frozen=True)
class Example:
    group: str
    correct: bool


@dataclass(frozen=True)
class Data:
    """Stands in for ``Examples``: a batch is its rows and as many steps as its last row number."""

    groups: tuple[str, ...]
    path: Path = Path("data.jsonl")
    right: tuple[int, ...] = (0, 1, 3)

    def __len__(self):
        return len(self.groups)

    @property
    def facts(self):
        return [Example(group, row in self.right) for row, group in enumerate(self.groups)]

    def batch(self, rows):
        return {"rows": torch.tensor(rows), "step_mask": torch.ones(len(rows), rows[-1] + 1)}


META = Data(("a", "b", "a", "c", "b", "c", "a", "b"))


def flat(questions):
    return [row for rows in questions for row in rows]


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_lower_batches_are_the_epochs_cut_in_order(seed, accumulation):
    options = replace(OPTIONS, seed=seed)
    rows = [7, 5, 3, 1, 0]
    draw = lower_draw(options, rows)
    drawn = [row for number in range(8) for row in flat(draw(number))]
    assert drawn == [rows[place] for place in epoch_order(5, 10 * seed + 1)(0, 24)]
    steps = per_step(train_batch(draw, META), accumulation)
    seen = [batch["rows"].tolist() for step in range(8 // accumulation) for batch in steps(step)]
    assert [row for batch in seen for row in batch] == drawn
    assert all(len(batch) == 3 for batch in seen)


def test_columns_are_those_of_the_rows_cut_to_the_steps_of_the_batch():
    draw = lambda number: [[4], [0], [2]]  # noqa: E731
    weights, probs = torch.arange(8.0), torch.arange(40.0).reshape(8, 5)
    batch = train_batch(draw, META, {"weights": weights, "reference_probs": probs})(0)
    assert batch["weights"].tolist() == [4.0, 0.0, 2.0]
    assert torch.equal(batch["reference_probs"], probs[[4, 0, 2], :3])


def test_solutions_are_drawn_one_by_one_or_by_question():
    single = upper_draw(OPTIONS, META)
    assert [flat(single(number)) for number in range(3)] == [
        epoch_order(8, 2)(6 * number, 6) for number in range(3)
    ]
    whole = upper_draw(replace(OPTIONS, loss_target="pairs"), META)
    # Six of eight solutions: two of the three questions, all of each.
    questions = [[0, 2, 6], [1, 4, 7], [3, 5]]
    for number in range(6):
        expected = [questions[place] for place in epoch_order(3, 2)(2 * number, 2)]
        assert whole(number) == expected


def test_a_meta_batch_is_no_larger_than_the_meta_set_and_no_smaller_than_a_question():
    assert len(flat(upper_draw(changed(OPTIONS, meta_batch_size=100), META)(0))) == 8
    pairs = replace(OPTIONS, loss_target="pairs")
    assert len(upper_draw(changed(pairs, meta_batch_size=100), META)(0)) == 3
    assert len(upper_draw(changed(pairs, meta_batch_size=1), META)(0)) == 1


def test_pairs_are_drawn_from_mixed_questions_alone():
    """One mixed question among three: every batch holds it, whatever the size."""
    data = replace(META, right=(0, 1, 2, 4, 6))  # of "a" and "b" some or all, of "c" none
    assert mixed_questions(data.facts) == ([[1, 4, 7]], 3)
    for size in (1, 2, 6, 100):
        draw = upper_draw(
            changed(replace(OPTIONS, loss_target="pairs"), meta_batch_size=size), data
        )
        assert [draw(number) for number in range(20)] == [[[1, 4, 7]]] * 20
    lower = lower_meta_draw(replace(OPTIONS, loss_target="pairs"), data)
    assert [lower(number) for number in range(5)] == [[[1, 4, 7]]] * 5
    assert count_visits(lower, 5, examples=8).tolist() == [0, 5, 0, 0, 5, 0, 0, 5]


def test_groups_are_told_apart_within_a_batch():
    """A question that two epochs bring into one batch counts as two."""
    batch = meta_batch(lambda number: [[0, 2, 6], [3, 5], [0, 2, 6]], META)(0)
    assert batch["rows"].tolist() == [0, 2, 6, 3, 5, 0, 2, 6]
    assert batch["group"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_training_on_the_meta_set_draws_as_the_lower_level_does():
    assert lower_meta_draw(OPTIONS, META)(2) == lower_draw(OPTIONS, range(8))(2)
    pairs = lower_meta_draw(replace(OPTIONS, loss_target="pairs"), META)
    assert [pairs(number) for number in range(3)] == [
        [[[0, 2, 6], [1, 4, 7], [3, 5]][place]] for place in epoch_order(3, 1)(0, 3)
    ]


def test_visits_are_counted_over_the_batches_that_were_made():
    draw = lower_draw(OPTIONS, range(5))
    made = [row for number in range(7) for row in train_batch(draw, META)(number)["rows"].tolist()]
    visits = count_visits(draw, 7, examples=8)
    assert visits.tolist() == [made.count(row) for row in range(8)]
    assert count_visits(draw, 0, examples=3).tolist() == [0, 0, 0]


def test_every_epoch_is_a_permutation_whatever_the_batches():
    order = epoch_order(10, seed=1)
    whole = order(0, 40)
    for epoch in range(4):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert whole[:10] != whole[10:20]
    assert [row for start in range(0, 40, 7) for row in order(start, 7)][:40] == whole


def test_same_seed_same_order():
    assert epoch_order(50, 3)(20, 60) == epoch_order(50, 3)(20, 60)
    assert epoch_order(50, 3)(0, 50) != epoch_order(50, 4)(0, 50)


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="0 rows"):
        epoch_order(0, 0)
