"""School problems as files of the comparison: what is in them, and estimated labels."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from prm.data.reader import read_examples
from prm.schema import Step, StepExample
from recipes.evidence.smollm2 import mathcheck
from recipes.evidence.smollm2.mathcheck import Sizes, estimated, split, write_files

SIZES = Sizes(2, 1, 1, train_solutions=8, cold_solutions=4, verified=0.25)


def solution(name, question, labels, correct=None, group="0") -> StepExample:
    steps = tuple(Step(f"{name} step {n}", label) for n, label in enumerate(labels))
    return StepExample(name, question, (), steps, correct=correct, group=group)


def problems(groups: int) -> list[StepExample]:
    rows = []
    for group in range(groups):
        for wording in range(2):
            question = f"problem {group}, wording {wording}"
            for name, labels, correct in (
                ("right", (1.0, 1.0, 1.0), True),
                ("marked", (1.0, 0.0, None), None),
                ("wrong", (None, None), False),
            ):
                row = solution(f"{name}-{group}-{wording}", question, labels, correct, str(group))
                rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("missed", "passed", "expected"),
    [
        (0.0, 0.0, [[1, 1, 1], [1, 0, None, None]]),  # what people found
        (0.0, 1.0, [[1, 1, 1], [1, 1, 1, 1]]),  # completions recover from every error
        (1.0, 1.0, [[0, None, None], [0, None, None, None]]),  # no completion is right
    ],
)
def test_estimates(monkeypatch, missed, passed, expected):
    monkeypatch.setattr(mathcheck, "MISSED", missed)
    monkeypatch.setattr(mathcheck, "PASSED", passed)
    rows = [solution("a", "q", (1.0, 1.0, 1.0)), solution("b", "q", (1.0, 0.0, None, None))]
    found = [[step.label for step in estimated(row, Random(0)).steps] for row in rows]
    assert found == expected


def test_estimates_err_as_often_as_is_said():
    rng = Random(0)
    first = [estimated(solution("a", "q", (1.0,)), rng).steps[0].label for _ in range(4000)]
    assert sum(first) / 4000 == pytest.approx(1 - mathcheck.MISSED, abs=0.015)  # 3 sigma
    first = [estimated(solution("a", "q", (0.0,)), rng).steps[0].label for _ in range(4000)]
    assert sum(first) / 4000 == pytest.approx(mathcheck.PASSED, abs=0.024)


def test_parts_share_no_group_and_hold_what_is_said():
    examples = problems(9)
    original = {example.id: example for example in examples}
    parts = split(examples, SIZES, seed=1)
    numbers = {name: len(rows) for name, rows in parts.items() if name != "clean"}
    assert numbers == {"train": 8, "cold-start": 4, "meta": 6, "dev": 6, "test": 12}
    learned = parts["train"] + parts["cold-start"]
    of = {
        name: {original[row.id].group for row in rows}
        for name, rows in (("learned", learned), *((n, parts[n]) for n in ("meta", "dev", "test")))
    }
    assert sum(len(groups) for groups in of.values()) == len(set().union(*of.values()))
    for row in parts["dev"] + parts["test"]:
        assert row.correct == row.id.startswith("right")
    for name in ("meta", "dev", "test"):
        for group in {row.group for row in parts[name]}:
            rows = [row for row in parts[name] if row.group == group]
            assert sorted(row.correct for row in rows) == [False, False, True]
            assert len({row.question for row in rows}) == 1
    assert all(step.label is None for row in parts["meta"] for step in row.steps)
    assert sum(row.extra["source"] == "verified" for row in learned) == 3
    for row in learned:
        assert row.correct is None
        truth = [step.label for step in original[row.id].steps]
        given = [step.label for step in row.steps]
        known = [None not in pair for pair in zip(truth, given, strict=True)]
        pairs = [
            pair for pair, both in zip(zip(truth, given, strict=True), known, strict=True) if both
        ]
        assert row.extra["wrong_labels"] == sum(one != other for one, other in pairs)
        if row.extra["source"] == "verified":
            assert given == truth
    assert parts["clean"] == [row for row in parts["train"] if row.extra["source"] == "verified"]
    assert split(examples, SIZES, seed=1) == parts != split(examples, SIZES, seed=2)
    with pytest.raises(ValueError, match="at least 12 labelled solutions to learn from, found 8"):
        split(problems(6), SIZES)


def test_the_real_collection(tmp_path):
    path = Path(__file__).parents[5] / "shared" / "data" / "mathcheck" / mathcheck.FILE
    if not path.is_file():
        pytest.skip(f"{path} is not there: the collection does not come with the package")
    numbers = write_files(path, tmp_path / "data")
    assert numbers == {
        **{"train": 160, "cold-start": 80, "clean": 78},
        **{"meta": 96, "dev": 144, "test": 480},
    }
    test = list(read_examples(tmp_path / "data" / "test.jsonl"))
    assert sum(row.correct for row in test) == 191
