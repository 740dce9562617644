"""What ``data validate`` finds, by files built to have it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prm.schema import Step, StepExample
from recipes.__main__ import main
from recipes.data_files.findings import mismatched
from recipes.data_files.options import ValidateOptions
from recipes.data_files.validate import validate
from recipes.evidence.bench_validate import write_visualprm
from tests.prm.tiny import save_image

EXACT = {
    "rows", "one_step_rows", "duplicate_rows", "duplicate_ids", "constant_id", "missing_images",
    "label_balance", "groups", "mixed_groups", "errors",
}  # fmt: skip


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def own(number, *labels, **more):
    steps = [{"text": f"step {place} of it", "label": x} for place, x in enumerate(labels)]
    return {"id": f"r{number}", "question": f"question {number}", "steps": steps, **more}


def figures(*paths, **more):
    return validate(ValidateOptions(files=tuple(map(str, paths)), **more))[1]


def page(*paths, **more):
    return validate(ValidateOptions(files=tuple(map(str, paths)), **more))[0]


def turns(question, steps, signs=None):
    found = [{"from": "human", "value": f"### Question:\n{question}"}]
    for number, step in enumerate(steps):
        found.append({"from": "human", "value": step})
        found.append({"from": "gpt", "value": signs[number] if signs else "+"})
    return found


def meta_like_the_published(folder: Path) -> Path:
    """A meta file with the properties of DreamPRM-1.5's, row for row.

    414 questions of 4 rows: 896 rows of a bare letter, 406 exact duplicates, 148 questions with
    both outcomes, 136 rows that cite a second image.
    """
    rows = []
    for question in range(414):
        about = "<image 1> and <image 2>" if question < 34 else "<image 1>"
        for candidate in range(4):
            # The last rows of the last questions repeat the first.
            number = candidate % 2 if question >= 414 - 203 else candidate
            letter = "ABCD"[number]
            steps = [f"because of {number}", f"Answer: {letter}"]
            rows.append(
                {
                    "id": f"test_{question}",
                    "response": letter,
                    "true_false": number % 2 == 0 if question < 148 else question % 2 == 0,
                    "image": f"../data/meta_images/{question}.png",
                    "conversations": turns(
                        f"{about} {question}?", [letter] if question >= 414 - 224 else steps
                    ),
                }
            )
    assert len(rows) == 1656
    (folder / "data" / "meta_images").mkdir(parents=True)
    for question in range(414):
        save_image(folder / "data" / "meta_images" / f"{question}.png", 8, 8)
    path = folder / "data" / "meta.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_the_published_meta_file_by_its_properties(tmp_path):
    path = meta_like_the_published(tmp_path)
    found = figures(path)
    assert found["errors"] == []
    assert found["formats"] == ["visualprm"]
    assert found["rows"] == 1656
    assert found["one_step_rows"] == 896
    assert found["duplicate_rows"] == 406
    assert (found["groups"], found["mixed_groups"]) == (414, 148)
    assert found["image_count_mismatches"] == 136
    assert found["missing_images"] == 0
    # The id names the question: 414 ids in 1,656 rows.
    assert (found["duplicate_ids"], found["constant_id"]) == (1656 - 414, False)
    # Its "+" are fillers.
    assert found["label_balance"] == {"+": 0, "-": 0, "soft": 0, "none": found["steps"]}
    written = tmp_path / "findings.json"
    assert main(["data", "validate", str(path), "--json", str(written)]) == 0
    assert json.loads(written.read_text()) == found
    text = page(path)
    assert len(text.splitlines()) < 40
    assert "896 (54.1 %)" in text
    assert "148 (35.7 %) have right and wrong solutions" in text


def test_fillers_of_visualprms_converter(tmp_path):
    (tmp_path / "images").mkdir()
    path = write_visualprm(tmp_path / "train.jsonl", rows=60, images=3)
    for number in range(2):
        save_image(tmp_path / "images" / f"{number:06d}.png", 8, 8)
    found = figures(path)
    assert (found["rows"], found["duplicate_ids"], found["constant_id"]) == (60, 59, True)
    assert (found["missing_images"], found["rows_with_bad_images"]) == (1, 20)
    assert [error["line"] for error in found["errors"]] == list(range(3, 61, 3))
    assert {error["field"] for error in found["errors"]} == {"image"}
    assert {tuple(error) for error in found["errors"]} == {("file", "line", "field", "message")}
    text = page(path)
    assert "all rows have the same id, a filler: examples are named by row" in text
    missing = f"{path.parent}/images/000002.png"
    assert text.count(missing) == 1  # one line for all 20
    assert f"  {path}:3 (and 19 more rows: 6, 9, 12, 15, 18, ...): field image: " in text
    array = write_visualprm(tmp_path / "train.json", rows=60, images=3, array=True)
    assert figures(array) == found | {
        "files": [str(array)],
        "errors": [error | {"file": str(array)} for error in found["errors"]],
    }


def test_every_kind_of_finding(tmp_path):
    save_image(tmp_path / "x.png", 8, 8)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    path = write(
        tmp_path / "a.jsonl",
        own(1, "+", "-", 0.25, None, images=["x.png"]),
        own(1, "+", "-", 0.25, None, images=["x.png"]) | {"id": "r1b"},  # duplicate
        own(1, "-", "-", 0.25, None, images=["x.png"]) | {"id": "r1c"},  # contradiction
        own(1, "+", "-", 0.75, None, images=["x.png"]) | {"id": "r1d"},  # another contradiction
        own(1, None, None, None, "+", images=["x.png"]) | {"id": "r1e"},  # neither
        own(2, "+"),
        {"id": "r3", "question": "q", "steps": [{"text": "D"}, {"text": "two words"}]},
        own(4, "+", "+", question="<image> and <image>", images=["x.png"]),
        own(5, "+", "+", question="<image 2>", images=["x.png"]),
        own(6, "+", "+", question="<image 1>", images=["x.png"]),
        own(7, "+", "+", images=["bad.png"]),
        own(8, "+", "+", images=["x.png", "none.png"]),
        own(9, "+", "+", images=["../out.png"]),
        own(1, "+", "+"),  # id again
        {"id": "r10", "question": "q", "steps": []},
    )
    found = figures(path)
    assert (found["rows"], found["examples"]) == (15, 14)
    assert found["duplicate_rows"] == 1
    assert found["contradictory_rows"] == 2
    assert found["one_step_rows"] == 1
    assert found["one_word_steps"] == 1
    assert found["unjudged_rows"] == 1
    assert found["image_count_mismatches"] == 2
    assert [found[f"{kind}_images"] for kind in ("missing", "unreadable", "outside")] == [1, 1, 1]
    assert found["rows_with_bad_images"] == 3
    assert (found["duplicate_ids"], found["constant_id"]) == (1, False)
    assert found["label_balance"] == {"+": 19, "-": 5, "soft": 4, "none": 9}
    places = [(error["line"], error["field"]) for error in found["errors"]]
    assert places == [
        (11, "images[0]"), (12, "images[1]"), (13, "images[0]"), (14, "id"), (15, "steps"),
    ]  # fmt: skip
    assert figures(path, images="exists")["unreadable_images"] == 0
    allowed = figures(path, allow_outside_images=True)
    assert (allowed["outside_images"], allowed["missing_images"]) == (0, 2)
    text = page(path)
    assert "one-step rows" in text
    assert "at 6" in text


def test_groups_and_outcomes(tmp_path):
    solved = [
        own(1, None, correct=True, group="a"), own(2, None, correct=False, group="a"),
        own(3, None, correct=True, group="b"),
        # Without a group, question and images tell.
        own(4, None, correct=False, question="same"), own(5, None, correct=True, question="same"),
        own(6, None, correct=True, question="other"), own(7, "+"),
    ]  # fmt: skip
    found = figures(write(tmp_path / "meta.jsonl", *solved))
    assert (found["groups"], found["mixed_groups"]) == (4, 2)
    assert found["outcome_balance"] == {"right": 4, "wrong": 2, "unknown": 1}


def test_sets_that_share_questions(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    save_image(tmp_path / "a" / "x.png", 8, 8)
    save_image(tmp_path / "b" / "renamed.png", 8, 8)
    save_image(tmp_path / "b" / "x.png", 9, 9)
    how_many = {"question": "How many  dots?"}
    train = write(
        tmp_path / "a" / "train.jsonl",
        own(1, "+", "-", **how_many, images=["x.png"]),
        own(2, "+", "-"), own(3, "+"),
    )  # fmt: skip
    test = write(
        tmp_path / "b" / "test.jsonl",
        own(10, "+", question="how many dots?", images=["renamed.png"]),  # same question
        own(11, "+", **how_many, images=["x.png"]),  # same words about another picture
        own(12, "-", "-", question="Question 2"),  # same solution
        own(13, "+"),
    )  # fmt: skip
    meta = write(tmp_path / "b" / "meta.jsonl", own(13, "+"), own(14, "+"))
    options = ValidateOptions(files=(str(train),), meta=str(meta), test=str(test))
    text, found = validate(options)
    assert found["shared"] == {
        "train_meta": {"questions": 0, "solutions": 0},
        "train_test": {"questions": 2, "solutions": 1},
        "meta_test": {"questions": 1, "solutions": 1},
    }
    assert (found["rows"], found["meta"]["rows"], found["test"]["rows"]) == (3, 2, 4)
    assert "meta and train share no question" in text
    assert "test and train share the questions of 2 solutions of test; at 1, 3" in text
    assert "1 of the solutions themselves; at 3" in text


def test_several_files_are_one_set(tmp_path):
    first = write(tmp_path / "a.jsonl", own(1, "+", "-"), own(2, "+", "+"))
    second = write(tmp_path / "b.jsonl", own(3, "+", "-"), own(1, "+", "-"), {"x": 1})
    text, found = validate(ValidateOptions(files=(str(first), str(second))))
    assert (found["rows"], found["duplicate_rows"], found["duplicate_ids"]) == (5, 1, 1)
    assert [(e["file"], e["line"]) for e in found["errors"]] == [(str(second), 2), (str(second), 3)]
    assert "first on line a.jsonl:1" in found["errors"][0]["message"]
    assert "at b.jsonl:2" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "at least one row"), (b"[]", "at least one row"), (b"\xff\xfe{}", "JSON in UTF-8")],
)
def test_files_without_rows(tmp_path, content, expected):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    (error,) = figures(path)["errors"]
    assert expected in error["message"]


def test_tokens_and_tiles(tmp_path, task):
    found = figures(task.data / "train.jsonl", model=str(task.model))
    assert found["tokens"]["min"] > 20
    assert found["tiles"]["min"] == found["tiles"]["max"] == 1
    assert found["tiles"]["sum"] == found["rows"]
    assert "tokens" in page(task.data / "train.jsonl", model=str(task.model))
    # What the model cannot take is an error of its line.
    path = write(tmp_path / "a.jsonl", own(1, "+"), own(2, "+", question="a <|im_start|> b"))
    (error,) = figures(path, model=str(task.model))["errors"]
    assert (error["line"], error["field"]) == (2, "question")


def test_command(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", own(1, "+", "-"))
    out = tmp_path / "out.json"
    assert main(["data", "validate", str(good), "--json", str(out)]) == 0
    assert capsys.readouterr().out.endswith("no errors\n")
    content = json.loads(out.read_text())
    assert set(content) >= EXACT
    assert content["errors"] == []
    bad = write(tmp_path / "bad.jsonl", own(1, "+"), own(2, "good"))
    assert main(["data", "validate", str(bad), "--json", str(out), "--overwrite"]) == 1
    assert json.loads(out.read_text())["errors"] == [
        {
            "file": str(bad),
            "line": 2,
            "field": "steps[0].label",
            "message": 'expected "+", "-", a number in [0, 1] or null (or [right, all], two counts '
            "of rollouts), found the string 'good'",
        }
    ]
    assert f"errors in 1 row\n  {bad}:2: field steps[0].label: expected" in capsys.readouterr().out
    assert main(["data", "validate", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
    assert main(["data", "validate", str(good), "--json", "no/such/folder.json"]) == 2
    assert main(["data", "validate", str(good), "--format", "stepwise"]) == 1


def test_memory_does_not_grow_with_the_length_of_rows(tmp_path):
    """Rows of 30 MB in all are checked in less memory than they take."""
    path = write_visualprm(tmp_path / "train.jsonl", rows=10_000, images=10)
    assert path.stat().st_size > 28e6
    # Not ru_maxrss, which begins at what the process held that started this one.
    code = (
        "from pathlib import Path\n"
        "from recipes.data_files.options import ValidateOptions\n"
        "from recipes.data_files.validate import validate\n"
        "def rss():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(1024 * int(line.split()[1]) for line in lines if line[:6] == 'VmHWM:')\n"
        "before = rss()\n"
        f"_, found = validate(ValidateOptions(files=({str(path)!r},), images='exists'))\n"
        "print(found['rows'], rss() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows, grown = map(int, done.stdout.split())
    assert rows == 10_000
    assert grown < 15e6


def candidates(number, *texts, **more):
    row = {"id": f"q{number}", "question": f"question {number}", "candidates": list(texts)}
    return row | {"true_false": [True] * len(texts), **more}


def test_errors_are_counted_in_rows_and_equal_ones_told_once(tmp_path):
    rows = [candidates(k, *[f"x = {c}" for c in range(16)], image=f"{k}.png") for k in range(12)]
    text, found = validate(ValidateOptions(files=(str(write(tmp_path / "test.jsonl", *rows)),)))
    assert (found["rows"], found["examples"], len(found["errors"])) == (12, 192, 12)
    assert " 12 (100.0 %) rows that cannot be used" in text
    assert "errors in 12 rows" in text
    told = [line for line in text.splitlines() if "no file at" in line]
    assert len(told) == len(set(told)) == 10
    assert "... and 2 others" in text


def test_a_group_with_two_questions_is_reported(tmp_path):
    save_image(tmp_path / "x.png", 8, 8)
    save_image(tmp_path / "same.png", 8, 8)
    save_image(tmp_path / "other.png", 9, 9)
    path = write(
        tmp_path / "a.jsonl",
        own(1, "+", group="g", question="Q one?"),
        own(2, "+", group="g", question="Q other?"),
        own(3, "+", group="g", question="q  one?\u200b"),  # the same, written otherwise
        own(4, "+", group="h", question="Q?", images=["x.png"]),
        own(5, "+", group="h", question="Q?", images=["same.png"]),
        own(6, "+", group="h", question="Q?", images=["other.png"]),
    )
    text, found = validate(ValidateOptions(files=(str(path),)))
    assert found["rows_of_another_question_in_group"] == 2
    assert "solutions of another question than the first of their group; at 2, 6" in text


def test_groups_that_differ_in_spelling_alone_are_reported(tmp_path):
    names = ["g", "g ", "G", "h", "h", "caf\u00e9", "cafe\u0301", "other"]
    rows = [own(n, "+", group=name, question=name) for n, name in enumerate(names)]
    text, found = validate(ValidateOptions(files=(str(write(tmp_path / "a.jsonl", *rows)),)))
    assert found["groups_alike"] == 3
    assert "Unicode form; they count as two; at 2, 3, 7\n" in text
    assert found["rows_of_another_question_in_group"] == 0


def test_what_is_not_read_beside_the_rows_is_told(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1.1", "data": [own(1, "+"), own(2, "-")]}))
    text, found = validate(ValidateOptions(files=(str(path),)))
    assert (found["rows"], found["errors"]) == (2, [])
    assert f"{path}: the rows of 'data' are read; 'version' beside them are not\n" in text


def test_one_answer_of_a_question_that_is_right_and_wrong_is_reported(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        own(1, "+", group="g", question="One?", answer="1/2", correct=True),
        own(2, "-", group="g", question="One?", answer="0.50", correct=False),
        own(3, "-", group="g", question="One?", answer="3", correct=False),
        own(4, "+", group="h", question="Another?", answer="3", correct=True),
        own(5, "-", group="h", question="Another?", answer=None, correct=False),
        own(6, "+", group="h", question="Another?", answer="3", correct=True),
        own(7, "+", group="h", question="A third?", answer="3", correct=False),
    )
    text, found = validate(ValidateOptions(files=(str(path),)))
    assert found["contradictory_outcomes"] == 1
    assert "and `correct` is not the same; at 2\n" in text


def test_a_leak_is_an_error_with_a_status_of_its_own(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", own(1, "+"))
    meta = write(tmp_path / "meta.jsonl", own(2, "+", question="Cafe\u0301  at 5?"))
    test = write(tmp_path / "test.jsonl", own(3, "+", question="CAF\u00c9 at 5?"), own(4, "+"))
    apart = write(tmp_path / "apart.jsonl", own(5, "+"))
    out = tmp_path / "out.json"

    def check(*words: object) -> int:
        return main(["data", "validate", *map(str, words), "--json", str(out), "--overwrite"])

    assert check(train, "--meta", meta, "--test", apart) == 0
    assert json.loads(out.read_text())["leaks"] == []
    assert capsys.readouterr().out.endswith("no errors\n")
    assert check(train, "--meta", meta, "--test", test) == 3
    assert json.loads(out.read_text())["leaks"] == ["meta_test"]
    said = capsys.readouterr().out
    assert "a leak: meta and test share questions" in said
    assert "no errors" not in said
    assert check(train, "--meta", meta, "--test", meta) == 3  # identical files
    assert check(test, "--test", test) == 3
    bad = write(tmp_path / "bad.jsonl", own(1, "good"))
    assert check(bad) == 1
    assert check(bad, "--meta", meta, "--test", test) == 3


def test_ids_that_two_sets_share_are_told(tmp_path):
    first = write(tmp_path / "a.jsonl", own(1, "+"))
    second = write(tmp_path / "b.jsonl", own(1, "+", question="another one"))
    assert "test and train share no question, but 1 ids" in page(first, test=str(second))


def test_a_picture_number_of_thousands_of_digits_is_one_that_is_not_there():
    text = f"<image {'9' * 5000}>"
    row = StepExample(id="a", question=text, images=(Path("x.png"),), steps=(Step("a", 1.0),))
    assert mismatched(row)
