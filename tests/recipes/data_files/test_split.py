"""``data split``: exact sizes, whole groups, everything once, the same for the same seed."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.data.reader import read_examples
from recipes.__main__ import main
from recipes.data_files.split import draw, exact_subset, parse_parts
from recipes.options.values import OptionError

WEIGHTS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def reachable(weights) -> set[int]:
    sums = {0}
    for weight in weights:
        sums |= {total + weight for total in sums}
    return sums


@given(WEIGHTS, st.integers(0, 60))
def test_a_subset_is_found_if_there_is_one(weights, total):
    found = exact_subset(weights, total)
    if total in reachable(weights):
        assert found is not None
        assert len(set(found)) == len(found)
        assert sum(weights[place] for place in found) == total
    else:
        assert found is None


def test_the_first_are_taken_while_they_fit():
    assert exact_subset([2, 2, 2, 2], 4) == [0, 1]
    assert exact_subset([3, 5, 2, 4], 7) == [0, 3]
    assert exact_subset([6, 5, 5], 10) == [1, 2]


@given(st.integers(1, 60), st.integers(0, 5), st.data())
def test_draw_counts_groups_exactly(groups, seed, data):
    first = data.draw(st.integers(1, groups))
    second = data.draw(st.integers(0, groups - first))
    sizes = {"a": first, "b": second} if second else {"a": first}
    parts = draw([1] * groups, sizes, seed)
    assert Counter(parts) == Counter({**sizes, None: groups - first - second})
    assert parts == draw([1] * groups, sizes, seed)


def test_every_group_is_as_likely_as_any_other():
    counts = Counter()
    for seed in range(600):
        parts = draw([1] * 6, {"a": 2, "b": None}, seed)
        counts.update(place for place, part in enumerate(parts) if part == "a")
    # 200 each; five standard deviations of a binomial count.
    assert all(
        abs(counts[place] - 200) < 5 * (600 * (1 / 3) * (2 / 3)) ** 0.5 for place in range(6)
    )


@pytest.mark.parametrize(
    ("weights", "sizes", "message"),
    [
        ([1, 1], {"a": 3}, "3 asked for, the file has 2"),
        ([4, 4], {"a": 2}, "no choice of whole groups has exactly 2 rows"),
        ([1, 1], {"a": 2, "b": None}, "nothing is left for it"),
    ],
)
def test_sizes_that_cannot_be_had(weights, sizes, message):
    with pytest.raises(OptionError, match=message):
        draw(weights, sizes, 0)


@pytest.mark.parametrize(
    "word", ["a", "a=", "a=0", "a=-1", "a=x", "=3", "a/b=3", "a=1 a=2", "a=rest b=rest", "..=3"]
)
def test_parts_that_are_none(word):
    with pytest.raises(OptionError, match="--parts"):
        parse_parts(word.split())


@pytest.fixture
def source(tmp_path):
    """40 questions of 1 to 4 rows; every second one without a group."""
    rows = []
    for question in range(40):
        for candidate in range(1 + question % 4):
            group = {"group": f"g{question}"} if question % 2 else {}
            row = {"id": f"{question}-{candidate}", "question": f"question {question}", **group}
            rows.append(row | {"steps": [{"text": f"step {candidate}", "label": "+"}]})
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def split(source, out, *parts, **more) -> int:
    words = [word for name, value in more.items() for word in (f"--{name}", str(value))]
    return main(["data", "split", str(source), "--out", str(out), "--parts", *parts, *words])


def parts_of(out):
    return {path.stem: read_examples(path) for path in sorted(out.iterdir())}


def test_parts_share_no_question_and_lose_no_row(source, tmp_path, capsys):
    out = tmp_path / "parts"
    assert split(source, out, "train=rest", "dev=7", "test=5") == 0
    said = capsys.readouterr().out
    parts = parts_of(out)
    questions = {name: {e.question for e in part} for name, part in parts.items()}
    assert {name: len(asked) for name, asked in questions.items()} == {
        "dev": 7, "test": 5, "train": 28,
    }  # fmt: skip
    assert sum(len(asked) for asked in questions.values()) == len(set().union(*questions.values()))
    together = [example for part in parts.values() for example in part]
    everything = read_examples(source)
    assert sorted(together, key=lambda e: e.id) == sorted(everything, key=lambda e: e.id)
    order = [example.id for example in everything]
    for part in parts.values():
        places = [order.index(example.id) for example in part]
        assert places == sorted(places)
    assert f"{out}/dev.jsonl: 7 groups, {len(parts['dev'])} rows\n" in said


def test_sizes_in_rows_are_exact(source, tmp_path):
    assert split(source, tmp_path / "parts", "a=rest", "b=31", "c=17", unit="rows") == 0
    assert {name: len(part) for name, part in parts_of(tmp_path / "parts").items()} == {
        "a": 100 - 31 - 17, "b": 31, "c": 17,
    }  # fmt: skip


def test_the_seed_decides(source, tmp_path):
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        assert split(source, tmp_path / f"{number}", "a=rest", "b=10", seed=seed) == 0
        drawn.append((tmp_path / f"{number}" / "b.jsonl").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_mistakes_leave_nothing_behind(source, tmp_path, capsys):
    out = tmp_path / "parts"
    for parts, message in (("a=99", "99 asked for, the file has 40"), ("a", "expected name=")):
        assert split(source, out, parts) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    out.mkdir()
    assert split(source, out, "a=1") == 2
    assert "exists; remove it" in capsys.readouterr().err
