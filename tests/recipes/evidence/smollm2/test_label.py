"""Labels of the Game of 24: by hand, by brute force, and those of the collection where it is."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction

import pytest

from recipes.evidence.smollm2.label import after, labelled, main, reaches
from tests.recipes.evidence.smollm2.source import source


def numbers(text: str) -> tuple[Fraction, ...]:
    return tuple(sorted(Fraction(word) for word in text.split()))


@pytest.mark.parametrize(
    ("left", "move", "then"),
    [
        ("4 5 6 10", "10 - 4 = 6 (left: 5 6 6)", "5 6 6"),
        ("4 5 6 10", "10 - 4 = 6 (left: 6 5 6)", "5 6 6"),
        ("4 5 6 10", "10 - 4 = 6 (left: 5 6)", None),  # one 6 is gone
        ("4 5 6 10", "10 - 4 = 5 (left: 5 5 6)", None),
        ("4 5 6 10", "10 - 3 = 7 (left: 5 6 7)", None),  # no 3
        ("5 6 6", "5 + 5 = 10 (left: 6 10)", None),  # one 5 only
        ("5 6 6", "6 / 5 = 1.2 (left: 1.2 6)", "1.2 6"),
        ("3 10", "10 / 3 = 3.333 (left: 3.333)", None),  # rounded
        ("3 10", "10 / 3 = 10/3 (left: 10/3)", "10/3"),
        ("0 7", "7 / 0 = 0 (left: 0)", None),
        ("4 6", "Answer: 4 * 6 = 24", None),
    ],
)
def test_moves(left, move, then):
    assert after(numbers(left), move) == (None if then is None else numbers(then))


def by_expressions(given: tuple[int, ...]) -> bool:
    """Whether some expression in the numbers is 24: every order, sign and bracketing as text."""
    shapes = ["(({a}{p}{b}){q}{c}){r}{d}", "({a}{p}({b}{q}{c})){r}{d}", "({a}{p}{b}){q}({c}{r}{d})"]
    shapes += ["{a}{p}(({b}{q}{c}){r}{d})", "{a}{p}({b}{q}({c}{r}{d}))"]
    for order in set(itertools.permutations(given)):
        a, b, c, d = (f"Fraction({number})" for number in order)
        for p, q, r in itertools.product("+-*/", repeat=3):
            for shape in shapes:
                text = shape.format(a=a, b=b, c=c, d=d, p=p, q=q, r=r)
                try:
                    if eval(text, {"Fraction": Fraction}) == 24:
                        return True
                except ZeroDivisionError:
                    continue
    return False


@pytest.mark.parametrize(
    ("given", "can"),
    [((4, 5, 6, 10), True), ((3, 3, 8, 8), True), ((1, 5, 5, 5), True), ((1, 1, 1, 1), False)],
)
def test_reach_is_every_expression(given, can):
    assert reaches(tuple(map(Fraction, given))) is can
    assert by_expressions(given) is can


def test_labels_of_a_solution():
    lines = ["10 - 4 = 6 (left: 5 6 6)", "6 / 6 = 1 (left: 1 5)", "1 * 5 = 24 (left: 24)"]
    found = labelled("4 5 6 10", [*lines, "Answer: (10 - 4) * 5 - 6 = 24"], True)
    assert [(step["valid"], step["reach"]) for step in found] == [(1, 1), (1, 0), (0, 0), (1, 1)]
    assert [step["kind"] for step in found] == ["step", "step", "step", "answer"]


def test_the_published_files_become_the_format(tmp_path):
    moves = "10 - 4 = 6 (left: 5 6 6)\n6 * 5 = 30 (left: 6 30)\n30 - 6 = 24 (left: 24)\n"
    log = [{"idx": 1, "ys": [f"Steps:\n{moves}Answer: (10 - 4) * 5 - 6 = 24"], "infos": [{"r": 1}]}]
    (tmp_path / "log.json").write_text(json.dumps(log))
    (tmp_path / "24.csv").write_text("Rank,Puzzles\n1,1 1 4 6\n2,4 5 6 10\n")
    out = tmp_path / "made" / "candidates.jsonl"
    main([str(tmp_path / "log.json"), str(tmp_path / "24.csv"), "--out", str(out)])
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (record["idx"], record["puzzle"]) == (1, "4 5 6 10")
    (candidate,) = record["candidates"]
    assert candidate["correct"] == 1
    assert [step["reach"] for step in candidate["steps"]] == [1, 1, 1, 1]
    assert candidate["steps"][0]["text"] == "10 - 4 = 6 (left: 5 6 6)"


def test_the_labels_of_the_collection_are_these():
    """33,865 moves and 9,157 answers; of ``valid``, which counts rounded results, all but ten."""
    differ = {"kind": 0, "valid": 0, "reach": 0}
    steps = 0
    for line in source().read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for candidate in row["candidates"]:
            texts = [step["text"] for step in candidate["steps"]]
            mine = labelled(row["puzzle"], texts, candidate["correct"] == 1)
            steps += len(texts)
            for found, given in zip(mine, candidate["steps"], strict=True):
                for name in differ:
                    differ[name] += found[name] != given[name]
    assert steps == 33_865 + 9_157
    assert differ == {"kind": 0, "valid": 10, "reach": 0}
