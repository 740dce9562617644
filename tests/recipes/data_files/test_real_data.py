"""Two real collections, where they lie beside the checkout: MathCheck (pictures) and Game of 24."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image

from prm.data.reader import read_examples
from prm.models.model import load_prm
from prm.scoring import score_examples
from recipes.__main__ import main
from recipes.data_files.options import ValidateOptions
from recipes.data_files.validate import validate
from recipes.models.loading import EMBEDDED_BASE

SHARED = Path(__file__).parents[4] / "shared" / "data"


def there(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not there: the collection does not come with the package")
    return path


def figures(path: Path):
    return validate(ValidateOptions(files=(str(path),)))[1]


def test_mathcheck_solutions():
    path = there("mathcheck/geo_process.jsonl")
    examples = read_examples(path, check_images="decode")
    assert len(examples) == 720
    assert len({image for example in examples for image in example.images}) == 60
    # 240 with exactly one first error, 288 right, 192 of which only the outcome is known.
    known = [e for e in examples if any(step.label is not None for step in e.steps)]
    assert len(known) == 528
    wrong = [e for e in known if any(step.label == 0 for step in e.steps)]
    assert len(wrong) == 240
    for example in wrong:
        labels = [step.label for step in example.steps]
        error = example.extra["first_error"]
        place = labels.index(0.0)
        assert labels[:place] == [1.0] * place
        assert set(labels[place + 1 :]) <= {None}
        assert error == place + 1
    found = figures(path)
    assert (found["errors"], found["formats"]) == ([], ["mathcheck"])
    assert (found["rows"], found["groups"]) == (720, 60)


def test_mathcheck_text():
    found = figures(there("mathcheck/gsm_process.jsonl"))
    assert (found["errors"], found["rows"], found["groups"]) == ([], 1548, 129)


def test_mathcheck_candidates():
    path = there("mathcheck/geo_candidates.jsonl")
    found = figures(path)
    # Seven questions have a model's reply that is empty: such a candidate cannot be used.
    assert {(e["field"], "blank" in e["message"]) for e in found["errors"]} == {
        ("candidates[3].response", True)
    }
    assert (found["rows"], len(found["errors"]), found["examples"]) == (240, 7, 240 * 18 - 7)
    assert found["groups"] == 240


def test_game_of_24():
    path = there("game24/candidates.jsonl")
    examples = read_examples(path)
    assert len(examples) == 10_000
    assert Counter(example.group for example in examples) == {e.group: 100 for e in examples}
    assert sum(bool(example.correct) for example in examples) == 403
    found = figures(path)
    assert (found["errors"], found["groups"], found["mixed_groups"]) == ([], 100, 49)
    # What is labelled as a legal first move is one.
    for example in examples[:300]:
        step = example.steps[0]
        words = step.text.split()
        if step.label == 1 and len(words) > 5 and words[3] == "=":
            a, b, c = (Fraction(words[place]) for place in (0, 2, 4))
            results = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}
            assert results[words[1]] == c, step.text


def grid_of(width: int, height: int, most: int, tile: int) -> tuple[int, int]:
    """InternVL's rule, written anew: the grid of at most ``most`` tiles nearest in its ratio."""
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most]
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        larger = width * height > 0.5 * tile**2 * columns * rows
        if distance < least or (distance == least and larger):
            best, least = (columns, rows), distance
    return best


def test_mathcheck_pictures_are_tiled_and_scored():
    path = there("mathcheck/geo_process.jsonl")
    examples = [
        example
        for example in read_examples(path)
        if any(step.label is not None for step in example.steps)
    ]
    prm = load_prm(EMBEDDED_BASE, dtype=torch.float64)
    collator = prm.collator(max_patches=6, max_length=2048)  # one has 1,241 tokens
    encoded = [collator.encode(example) for example in examples]
    assert len(encoded) == 528
    tile = prm.image_processor.size["height"]
    for row in encoded:
        (picture,) = row.example.images
        with Image.open(picture) as image:
            columns, rows = grid_of(*image.size, 6, tile)
        tiles = columns * rows
        assert row.tile_counts == (tiles + (tiles > 1),), picture
        assert len(row.label_positions) == len(row.example.steps)
    some = encoded[::48]
    together = score_examples(prm, {}, some, collator, 4)
    for row, scores in zip(some, together, strict=True):
        (alone,) = score_examples(prm, {}, [row], collator, 1)
        torch.testing.assert_close(scores, alone, rtol=1e-9, atol=0)
        assert scores.shape == (len(row.example.steps),)
    # Without its picture a solution has other scores.
    blind = collator.encode(replace(some[0].example, images=()))
    assert (score_examples(prm, {}, [blind], collator, 1)[0] - together[0]).abs().min() > 1e-6


def test_mathcheck_by_the_commands(tmp_path, capsys):
    """From the collection as it is to a selected solution of every question."""
    path = there("mathcheck/geo_process.jsonl")
    questions = dict.fromkeys(example.group for example in read_examples(path))
    chosen = list(questions)[:4]
    part = tmp_path / "part.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["group"] in chosen and row["variant"] == "seed_question"]
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scores, selected = tmp_path / "scores.jsonl", tmp_path / "selected.jsonl"
    score = ["score", "--file", str(part), "--output", str(scores), "--max-patches", "6"]
    assert main([*score, "--image-root", str(path.parent)]) == 0
    found = [json.loads(line) for line in scores.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [len(row["step_scores"]) for row in found] == [len(row["steps"]) for row in rows]
    assert main(["select", "--scores", str(scores), "--output", str(selected)]) == 0
    best = [json.loads(line) for line in selected.read_text(encoding="utf-8").splitlines()]
    assert [row["group"] for row in best] == chosen
    for row in best:
        means = {
            other["id"]: sum(other["step_scores"]) / len(other["step_scores"])
            for other in found
            if other["group"] == row["group"]
        }
        assert means[row["id"]] == pytest.approx(max(means.values()), rel=1e-6)
