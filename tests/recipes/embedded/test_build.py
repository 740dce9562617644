"""The embedded data set: what its files promise."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import recipes.embedded.build
from recipes.embedded.build import Sizes, build
from recipes.embedded.questions import (
    FAMILIES,
    Exact,
    Question,
    answer,
    draw_question,
    judged_by,
    solve,
    stated_answer,
)
from recipes.embedded.sheets import (
    CELLS,
    PICTURES,
    SPLITS,
    Scans,
    draw_sheet,
    load_scans,
    renamed,
)
from recipes.embedded.sources import SOURCES, Mixture, judge, true_labels
from recipes.embedded.student import attempt, draw_difficulty

SMALL = Sizes(
    train_questions=40,
    train_solutions=2,
    cold_questions=40,
    meta_questions=6,
    dev_questions=5,
    test_questions=7,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("embedded") / "data"
    counts = build(directory, seed=3, sizes=SMALL)
    rows = {
        name: [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]
        for name in counts
    }
    assert counts == {name: len(content) for name, content in rows.items()}
    return directory, rows


def test_splits_share_no_scan_and_hold_every_digit():
    scans = load_scans()
    assert list(scans) == list(SPLITS)
    assert sum(len(part.digits) for part in scans.values()) == 1797
    seen = Counter(image.tobytes() for part in scans.values() for image in part.images)
    # A few scans of the collection itself are identical; none of them may cross splits.
    for content, times in seen.items():
        if times > 1:
            owners = [
                name
                for name, part in scans.items()
                if any(image.tobytes() == content for image in part.images)
            ]
            assert len(owners) == 1
    for part in scans.values():
        assert set(part.digits) == set(range(10))


@pytest.mark.parametrize("picture", PICTURES)
def test_sheet_shows_each_value_in_its_own_cell(picture):
    scans = load_scans()["test"]
    values = dict(zip(CELLS, (0, 9, 9, 9), strict=True))
    sheet = draw_sheet(values, scans, np.random.default_rng(0), picture)
    assert sheet.shape == (32, 32)
    assert sheet.dtype == np.uint8
    again = draw_sheet(values, scans, np.random.default_rng(0), picture)
    assert (sheet == again).all()
    if picture == "dots":
        bright = (sheet.reshape(2, 16, 2, 16) > 128).sum((1, 3))
        assert bright[0, 0] == 0
        assert (bright.flatten()[1:] == bright[1, 1]).all()


def test_counting_from_the_other_end_swaps_rows_and_twice_is_nothing():
    values = dict(zip(CELLS, (1, 2, 3, 4), strict=True))
    assert renamed(values) == {"A1": 3, "A2": 4, "B1": 1, "B2": 2}
    assert renamed(renamed(values)) == values


def test_exact_solutions_are_right_and_have_five_steps():
    values = {"A1": 7, "A2": 2, "B1": 5, "B2": 9}
    texts = {}
    for family, expected in (("sum", 14), ("gap", 4), ("largest", 7)):
        question = Question(family, ("A1", "A2", "B1"), values)
        steps, stated = solve(question, Exact(values))
        assert stated == answer(question) == expected
        assert len(steps) == 5
        assert all(true_labels(steps))
        texts[family] = [step.text for step in steps]
    assert texts["gap"] == [
        "A1= 7", "A2= 2", "7 plus 2 = 9", "B1= 5", "9 gap 5 = 4",
    ]  # fmt: skip


def test_right_labels_judge_every_step_on_its_own():
    values = dict(zip(CELLS, (1, 2, 3, 4), strict=True))
    question = Question("sum", ("A1", "A2", "B1"), values)

    class Misreads(Exact):
        def read(self, cell):
            return 8 if cell == "A2" else self.values[cell]

    steps, stated = solve(question, Misreads(values))
    assert true_labels(steps) == [True, False, True, True, True]
    assert stated == stated_answer(steps) == 12
    assert true_labels(judged_by(steps, {**values, "A2": 8})) == [True] * 5


def test_sources_err_as_they_say():
    rng = np.random.default_rng(0)
    mixture = Mixture()
    seen = Counter()
    for _ in range(12_000):
        question = draw_question(rng)
        found = attempt(question, draw_difficulty(question, rng), rng)
        steps, difficulty = found.steps, found.difficulty
        right, truth = found.answer == answer(question), true_labels(steps)
        assert judge("verified", question, found, mixture, rng) == truth
        other = judge("guideline", question, found, mixture, rng)
        for step, label in zip(steps, other, strict=True):
            if step.reading is None:
                assert label == step.true
            else:
                cell, value = step.reading
                assert label == (question.values[{"A": "B", "B": "A"}[cell[0]] + cell[1]] == value)
        crowd = judge("crowd", question, found, mixture, rng)
        seen["flipped"] += sum(a != b for a, b in zip(crowd, truth, strict=True))
        seen["steps"] += len(steps)
        rollout = judge("rollout", question, found, mixture, rng)
        if not all(truth):
            seen["wrong, right answer" if right else "wrong"] += 1
            seen["wrong, right answer, passed" if right else "wrong, passed"] += all(rollout)
        else:
            seen["right steps"] += len(steps)
            seen["right steps failed"] += rollout.count(False)
        weak = judge("judge", question, found, mixture, rng)
        for step, label in zip(steps, weak, strict=True):
            if step.reading is None:
                seen["slips"] += not step.true
                seen["slips passed"] += not step.true and label
                assert label or not step.true
            elif difficulty.misread[step.reading[0]] > 0.3:
                # On a hard cell the judge sees what the solver is tempted to see.
                cell, value = step.reading
                assert label == (value == difficulty.taken_for[cell])
    assert seen["flipped"] / seen["steps"] == pytest.approx(mixture.flip, abs=0.015)
    assert seen["wrong, right answer, passed"] == seen["wrong, right answer"] > 0
    assert seen["wrong, passed"] / seen["wrong"] == pytest.approx(mixture.recovery, abs=0.02)
    assert seen["right steps failed"] / seen["right steps"] == pytest.approx(
        mixture.failure, abs=0.02
    )
    assert seen["slips passed"] / seen["slips"] == pytest.approx(mixture.lenience, abs=0.04)


def test_candidates_err_together():
    """Majority vote must be beatable: wrong answers agree far more often than by chance."""
    rng = np.random.default_rng(1)
    wrong_majority = mixed = 0
    for _ in range(300):
        question = draw_question(rng)
        difficulty = draw_difficulty(question, rng)
        stated = [attempt(question, difficulty, rng).answer for _ in range(8)]
        right = stated.count(answer(question))
        mixed += 0 < right < 8
        wrong_majority += right > 0 and Counter(stated).most_common(1)[0][1] > right
    assert mixed / 300 > 0.6
    assert wrong_majority / 300 > 0.2


def test_files_hold_what_they_promise(data):
    directory, rows = data
    assert {row["domain"] for row in rows["train"]} == set(FAMILIES)
    assert {row["source"] for row in rows["train"]} == set(SOURCES)
    assert all(row["wrong_labels"] == 0 for row in rows["train"] if row["source"] == "verified")
    assert rows["clean"] == [row for row in rows["train"] if row["source"] == "verified"]
    correct = [row["correct"] for row in rows["meta"]]
    assert correct.count(True) == correct.count(False) == len(correct) // 2
    assert all(step["label"] is None for row in rows["meta"] for step in row["steps"])
    for name in ("dev", "test"):
        assert set(Counter(row["group"] for row in rows[name]).values()) == {8}
        assert "source" not in rows[name][0]
    shares = {source: 80 * share for source, share in zip(SOURCES, Mixture().shares(), strict=True)}
    for name in ("train", "cold-start"):
        found = Counter(row["source"] for row in rows[name])
        assert all(abs(found[source] - share) <= 2 for source, share in shares.items())
    names = ("train", "cold-start", "meta", "dev", "test")
    ids = [row["id"] for name in names for row in rows[name]]
    assert len(ids) == len(set(ids))
    for row in rows["test"]:
        with Image.open(directory / row["images"][0]) as image:
            assert image.size == (32, 32)


@pytest.mark.parametrize("name", ["train", "meta", "test"])
def test_right_answers_count_rows_from_the_bottom(name, tmp_path, monkeypatch):
    """With scans that are even areas, whose brightness is the digit, the pixels tell the values.

    Row A is below row B then, and the right candidates and the verified labels read it so. Read
    from the top instead, most of these sheets contradict them.
    """
    shades = np.arange(10, dtype=np.uint8)[:, None, None] * 20 + 40
    even = Scans(np.broadcast_to(shades, (10, 8, 8)).astype(np.uint8), np.arange(10))
    monkeypatch.setattr(recipes.embedded.build, "load_scans", lambda: dict.fromkeys(SPLITS, even))
    build(tmp_path / "data", seed=5, sizes=SMALL)
    lines = (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row.get("correct") or row.get("source") == "verified"]
    if name == "meta":  # without labels of steps; two mistakes seldom cancel in a sum
        rows = [row for row in rows if row["domain"] == "sum"]
    errors = {"bottom": [], "top": []}
    for row in rows:
        with Image.open(tmp_path / "data" / row["images"][0]) as image:
            pixels = np.asarray(image, dtype=float)
        readings = [
            (step["text"][:2], int(step["text"].split()[-1]))
            for step in row["steps"]
            if step["text"][2:].startswith("= ") and step["label"] != "-"
        ]
        if not readings:
            continue
        expected = np.array([value * 20 + 40 for _, value in readings], dtype=float)
        for end in errors:
            found = [brightness(pixels, cell, end) for cell, _ in readings]
            # The whole sheet is dimmed by one factor, the ratio of which is the best fit.
            factor = np.dot(found, expected) / np.dot(expected, expected)
            errors[end].append(np.abs(found - factor * expected).max())
    fitting = {end: np.mean(np.array(found) < 12) for end, found in errors.items()}
    assert len(errors["bottom"]) >= 4
    assert fitting["bottom"] == 1
    assert fitting["top"] < 0.5


def brightness(pixels: np.ndarray, cell: str, end: str) -> float:
    """The mean of the middle of a cell, with row A at the given end of the sheet."""
    row = "AB".index(cell[0])
    y = 16 * (1 - row if end == "bottom" else row) + 8
    x = 16 * (int(cell[1]) - 1) + 8
    return float(pixels[y - 2 : y + 2, x - 2 : x + 2].mean())


def test_same_seed_same_bytes_and_no_overwriting(data, tmp_path):
    directory, _ = data
    build(tmp_path / "again", seed=3, sizes=SMALL)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            assert (
                path.read_bytes() == (tmp_path / "again" / path.relative_to(directory)).read_bytes()
            )
    with pytest.raises(FileExistsError, match="exists; remove it"):
        build(tmp_path / "again", seed=3, sizes=SMALL)


def test_mixture_must_sum_to_one():
    with pytest.raises(ValueError, match="sum to 1"):
        Mixture(verified=0.9).shares()
