"""Two real collections, where they lie beside the checkout: MathCheck (pictures) and Game of 24."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from prm.reader import read_examples
from recipes.data_files.options import ValidateOptions
from recipes.data_files.validate import validate

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
    # Seven questions have a model's reply that is empty: such a row cannot be used.
    assert {(e["field"], "blank" in e["message"]) for e in found["errors"]} == {
        ("candidates[3].response", True)
    }
    assert (found["rows"], len(found["errors"]), found["examples"]) == (240, 7, 233 * 18)
    assert found["groups"] == 233


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
