"""What the axes measure: batches of the sizes they name, bytes that can be counted by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import distributed

from prm.data.reader import read_jsonl
from recipes.evidence.bench import copies
from recipes.evidence.growth import candidates, ranks, shards, steps, tables
from recipes.evidence.growth.__main__ import main
from recipes.evidence.growth.plan import table
from recipes.evidence.growth.upper_gradient import ways

THETA = 4 * (tables.WIDTH + 1)
COUNTS = 8 * 6  # of steps, of the solver and of both optimizers


def test_tables_hold_three_numbers_a_row_and_axes_are_kept(tmp_path):
    output = tmp_path / "growth.json"
    main(["plan", "--output", str(output)])
    main(["table-adam", "--sizes", "100", "1000", "--rounds", "1", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["plan"]["rows"] == table()
    rows = found["table-adam"]["rows"]
    assert [row["size"] for row in rows] == [100, 1000]
    for row in rows:
        assert row["state_bytes"] == 3 * (THETA + 4 * row["size"]) + COUNTS
        assert 0 < row["checkpoint_bytes"] - row["state_bytes"] < 2000
        assert row["step_bytes"] > 12 * row["size"]
    assert found["table-adam"]["command"].startswith("python -m recipes.evidence.growth table-adam")
    assert 0 < found["table-adam"]["fits"]["state_bytes"]["last"] < 1


@pytest.mark.parametrize("rows", [100, 1000])
def test_a_batch_visits_different_rows(rows):
    index = tables.batch_of(rows, 1)["index"]
    assert len(set(index.tolist())) == tables.BATCH
    assert int(index.max()) < rows


@pytest.mark.parametrize(
    ("axis", "size", "examples", "tokens", "tiles"),
    [("batch", 4, 4, 128, 1), ("tokens", 512, 2, 512, 1), ("tiles", 3, 2, 160, 3)],
)
def test_batches_of_the_axes(axis, size, examples, tokens, tiles):
    race = steps.make_race(steps.SHAPE, torch.float32)
    batch = steps.batch_of(race, steps.CASES[axis](size), 0)
    assert batch["input_ids"].shape == (examples, tokens)
    assert len(batch["pixel_values"]) == examples * tiles
    images = (batch["input_ids"] == steps.image_token_id(steps.SHAPE)).sum(1)
    assert images.tolist() == [16 * tiles] * examples
    assert int(batch["label_positions"].max()) == tokens - 1
    losses, _ = race.objective.per_example_loss(race.params, batch)
    assert losses.shape == (examples,)


def test_bytes_are_counted_at_each_collective(monkeypatch):
    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(distributed, name, lambda *_, **__: None)
    before = distributed.all_reduce
    with ranks.counted() as sent:
        distributed.all_reduce(torch.zeros(5), group=None)
        distributed.all_reduce(torch.zeros(2, dtype=torch.float64))
        distributed.all_gather([torch.zeros(9)], torch.zeros(3))
        distributed.broadcast(torch.zeros(1), group_src=0)
    assert sent == {"all_reduce": 36, "all_gather": 12, "broadcast": 4}
    assert distributed.all_reduce is before


def test_one_rank_sends_nothing_and_has_all_micro_batches(monkeypatch):
    monkeypatch.setattr(ranks, "EXAMPLES", 2)
    monkeypatch.setattr(ranks, "STEPS", 1)
    found = ranks.steps(0, 1, ranks.ALONE)
    assert (found["bytes"], found["phi_bytes"]) == (0, 4 * ranks.TABLE)
    assert found["theta_bytes"] == 4 * ranks.LAYERS * ranks.WIDTH * (ranks.WIDTH + 1)


@pytest.mark.parametrize(
    ("call", "of_two", "of_three"),
    [
        ("all_reduce", 600, 800),  # to the next in a ring, R − 1 times a part, and once more
        ("all_gather_single", 600, 1200),  # the shard to each of the others
        ("all_to_all_single", 300, 400),  # all parts but the own
    ],
)
def test_bytes_that_a_rank_sends_of_600_handed_over(call, of_two, of_three):
    assert shards.sent({call: 600}, 1) == 0
    assert shards.sent({call: 600}, 2) == of_two
    assert shards.sent({call: 600}, 3) == pytest.approx(of_three)


@pytest.mark.parametrize("kind", shards.KINDS)
def test_a_rank_alone_holds_all_and_sends_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "WIDTH", 32)
    monkeypatch.setattr(copies, "LAYERS", 3)
    with ranks.joined(str(tmp_path / "store"), 0, 1):
        found = shards.steps(0, 1, kind)
    size = 4 * 3 * 32 * 32
    assert found["theta_bytes"] == size
    assert found["held_bytes"] == 3 * size + 8  # θ, two moments and the number of steps
    assert found["sent_bytes"] == 0
    assert found["peak_bytes"] >= 5 * size  # and the gradient, and μ


def test_candidates_can_be_evaluated(tmp_path):
    file, scores = candidates.write_files(tmp_path, 64)
    assert len(read_jsonl(file)) == 64
    figures = candidates.measure(str(file), str(scores), str(tmp_path / "results.json"))
    assert figures["cpu_ms"] > 0
    assert figures["peak_bytes"] > figures["bytes_beyond_start"] >= 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["n_questions"], results["n_solutions"]) == (8, 64)
    assert results["solutions"]["auc_ci95"] is not None


def test_ways_of_ten_steps(monkeypatch):
    """A fresh upper gradient is the tenfold of one for ten steps."""
    from recipes.evidence.bench import embedded

    setup = embedded.make_setup(2, 8)
    calls = {"upper": 0}
    original = type(setup.objective).upper_loss_and_scores

    def counting(self, *arguments):
        calls["upper"] += 1
        return original(self, *arguments)

    monkeypatch.setattr(type(setup.objective), "upper_loss_and_scores", counting)
    found = {}
    for name, run in ways(setup, (1, 10)).items():
        calls["upper"] = 0
        run()
        found[name] = calls["upper"]
    assert found == {"plain training": 0, "floor": 10, "1": 10, "10": 1}
