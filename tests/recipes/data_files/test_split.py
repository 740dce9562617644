"""``data split``: exact sizes, whole groups, everything once, the same for the same seed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.data.reader import read_examples
from recipes.__main__ import main
from recipes.data_files import split as module
from recipes.data_files.split import draw, exact_subset, parse_parts
from recipes.options.values import OptionError
from tests.prm.tiny import save_image

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


@pytest.mark.parametrize("size", ["9" * 5000, "-" + "9" * 5000, str(10**9 + 1)])
def test_a_size_of_too_many_digits_is_refused_in_a_short_sentence(size):
    with pytest.raises(OptionError, match="at most 1,000,000,000") as caught:
        parse_parts([f"a={size}"])
    assert len(str(caught.value)) < 400
    assert parse_parts([f"a={10**9}", "b=007"]) == {"a": 10**9, "b": 7}


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
    assert "in no part" not in said


def test_rows_that_no_part_takes_are_counted(source, tmp_path, capsys):
    assert split(source, tmp_path / "parts", "a=10", "b=25") == 0
    taken = sum(len(part) for part in parts_of(tmp_path / "parts").values())
    assert f"5 groups, {100 - taken} rows are in no part" in capsys.readouterr().out


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


def test_mistakes_leave_nothing_behind(source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "parts"
    for parts, message in (("a=99", "99 asked for, the file has 40"), ("a", "expected name=")):
        assert split(source, out, parts) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    out.mkdir()
    assert split(source, out, "a=1") == 2
    assert "exists; remove it" in capsys.readouterr().err
    monkeypatch.chdir(source.parent)
    before = sorted(source.parent.rglob("*"))
    assert split(source, Path(), "a=1") == 2
    assert "--out .: exists; remove it" in capsys.readouterr().err
    assert sorted(source.parent.rglob("*")) == before


def file_of(path: Path, *rows: dict) -> Path:
    steps = [{"text": "s", "label": "+"}]
    lines = [json.dumps({"id": f"r{n}", "steps": steps, **row}) for n, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_question_of_several_groups_stays_on_one_side(tmp_path, capsys):
    rows = [{"question": "Same question?", "group": f"g{n}"} for n in range(6)]
    rows += [{"question": f"Other {n}?", "group": f"g{n}"} for n in range(6, 12)]
    source = file_of(tmp_path / "all.jsonl", *rows)
    for seed in range(4):
        out = tmp_path / f"{seed}"
        assert split(source, out, "train=rest", "test=3", seed=seed) == 0
        asked = {n: {e.question for e in part} for n, part in parts_of(out).items()}
        assert not asked["train"] & asked["test"]
        assert (len(asked["train"]), len(asked["test"])) == (4, 3)
    assert "5 groups were joined with others that have the same question" in capsys.readouterr().out


SAME = ["Compute 1+1.", "Compute 1+1. ", "Compute  1+1.", "compute 1+1.", "Comp\u200bute\t1+1."]
SAME_ACCENT = ["Caf\u00e9?", "Cafe\u0301?", "CAF\u00c9?", "\ufeffcafe\u0301?"]


@pytest.mark.parametrize("same", [SAME, SAME_ACCENT], ids=["spaces", "accents"])
def test_the_same_question_written_otherwise_stays_on_one_side(tmp_path, same):
    rows = [{"question": question} for question in (*same, "Other?", "Another?")]
    source = file_of(tmp_path / "all.jsonl", *rows)
    for seed in range(4):
        out = tmp_path / f"{seed}"
        assert split(source, out, "a=rest", "b=1", seed=seed) == 0
        places = {n: {e.id for e in part} for n, part in parts_of(out).items()}
        together = {f"r{n}" for n in range(len(same))}
        assert together <= places["a"] or together == places["b"]


def test_groups_are_joined_by_way_of_others_and_by_the_content_of_pictures(tmp_path):
    save_image(tmp_path / "x.png", 8, 8)
    shutil.copy(tmp_path / "x.png", tmp_path / "copy.png")
    save_image(tmp_path / "y.png", 9, 9)
    source = file_of(
        tmp_path / "all.jsonl",
        {"question": "A?", "group": "1"}, {"question": "B?", "group": "1"},
        {"question": "B?", "group": "2"}, {"question": "b?"},  # 1 and 2 share B
        {"question": "See?", "images": ["x.png"]}, {"question": "See?", "images": ["copy.png"]},
        {"question": "See?", "images": ["y.png"]},  # another picture, another question
    )  # fmt: skip
    assert split(source, tmp_path / "three", "a=1", "b=1", "c=1") == 0
    together = [
        frozenset(int(json.loads(line)["id"][1:]) for line in path.read_text().splitlines())
        for path in (tmp_path / "three").iterdir()
    ]
    assert set(together) == {frozenset({0, 1, 2, 3}), frozenset({4, 5}), frozenset({6})}
    assert split(source, tmp_path / "four", "a=4") == 2


def test_a_split_that_is_interrupted_leaves_no_part_and_can_be_repeated(
    source, tmp_path, monkeypatch
):
    real, calls = module.write_jsonl, []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(module, "write_jsonl", once)
    out = tmp_path / "parts"
    assert split(source, out, "a=rest", "b=5") == 130
    assert not out.exists()
    monkeypatch.setattr(module, "write_jsonl", real)
    assert split(source, out, "a=rest", "b=5") == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_split_that_is_killed_leaves_no_part_and_can_be_repeated(source, tmp_path):
    out = tmp_path / "parts"
    code = (
        "import os\n"
        "from recipes.__main__ import main\n"
        "from recipes.data_files import split\n"
        "write = split.write_jsonl\n"
        "def once(*given):\n"
        "    write(*given)\n"
        "    os.kill(os.getpid(), 9)\n"
        "split.write_jsonl = once\n"
        f"main(['data', 'split', {str(source)!r}, '--out', {str(out)!r}, '--parts', 'a=9', 'b=5'])"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not out.exists()
    assert split(source, out, "a=rest", "b=5") == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_the_root_of_the_images_is_told_for_files_with_images(source, tmp_path, capsys):
    assert split(source, tmp_path / "parts", "a=rest") == 0
    assert "images are relative" not in capsys.readouterr().out
    save_image(tmp_path / "x.png", 8, 8)
    pictured = file_of(tmp_path / "pictured.jsonl", {"question": "See?", "images": ["x.png"]})
    assert split(pictured, tmp_path / "more", "a=rest") == 0
    assert f"images are relative to {tmp_path}: give it" in capsys.readouterr().out
