"""``data convert``: nothing is lost between formats, and learned weights come along."""

from __future__ import annotations

import json
import shutil

import pytest

from prm.data.reader import read_examples, read_jsonl
from recipes.__main__ import main
from recipes.options.parse import resolve
from recipes.train.training import run_training
from tests.tiny_task import read_lines


def convert(*words) -> int:
    return main(["data", "convert", *map(str, words)])


def test_own_to_stepwise_and_back(task, tmp_path, capsys):
    source = task.data / "train.jsonl"
    stepwise, own = tmp_path / "stepwise.jsonl", tmp_path / "own.jsonl"
    assert convert(source, "--to", "stepwise", "--out", stepwise) == 0
    assert capsys.readouterr().out == (
        f"{stepwise}: 18 examples; images are relative to {task.data}: give it as --image-root\n"
    )
    root = ["--image-root", task.data]
    assert convert(stepwise, "--to", "prm-jsonl", "--out", own, *root) == 0
    before, after = read_jsonl(source), read_jsonl(own, task.data)
    shown = ("id", "question", "images", "steps", "domain", "answer", "correct", "group")
    for name in shown:
        assert [getattr(e, name) for e in before] == [getattr(e, name) for e in after]
    assert {type(x) for row in read_lines(stepwise) for x in row["labels"]} <= {bool, type(None)}


def test_own_to_own_keeps_everything(task, tmp_path):
    out = tmp_path / "own.jsonl"
    assert convert(task.data / "train.jsonl", "--out", out) == 0
    assert read_jsonl(out, task.data) == read_jsonl(task.data / "train.jsonl")


def test_one_soft_label_makes_floats_of_all(tmp_path):
    rows = [
        {"id": "a", "question": "q", "steps": [{"text": "s", "label": "+"}, {"text": "t"}]},
        {"id": "b", "question": "q", "steps": [{"text": "s", "label": 0.25}]},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert convert(source, "--to", "stepwise", "--out", out) == 0
    assert [row["labels"] for row in read_lines(out)] == [[1.0, None], [0.25]]
    assert '"labels": [1.0, null]' in out.read_text()


def test_learned_weights_become_a_column(task, tmp_path):
    run = run_training(task.train(tmp_path / "run", weighting="table"))
    weights = {row["id"]: row["weight"] for row in read_lines(run / "weights.jsonl")}
    out = tmp_path / "out.jsonl"
    words = ["--to", "stepwise", "--weights", run / "weights.jsonl", "--out", out]
    assert convert(task.data / "train.jsonl", *words) == 0
    assert {row["id"]: row["weight"] for row in read_lines(out)} == weights


def test_any_format_trains_the_same_model(task, tmp_path):
    """The same rows as conversations, with the ids that VisualPRM gives none."""
    plain = run_training(task.train(tmp_path / "plain", weighting="none"))
    rows = []
    for row in read_lines(task.data / "train.jsonl"):
        turns = []
        for number, step in enumerate(row["steps"]):
            head = f"### Question:\n{row['question']}\n\n### Solution Process:\n"
            turns.append({"from": "human", "value": (head if number == 0 else "") + step["text"]})
            turns.append({"from": "gpt", "value": step["label"]})
        rows.append({"id": -1, "image": row["images"][0], "conversations": turns})
    folder = shutil.copytree(task.data, tmp_path / "data")
    (folder / "train.json").write_text(json.dumps(rows))
    file = str(folder / "train.json")
    run = run_training(task.train(tmp_path / "run", weighting="none", train_file=file))
    bits = [(at / "model" / "model.safetensors").read_bytes() for at in (plain, run)]
    assert bits[0] == bits[1]
    names = [row["id"] for row in read_lines(run / "weights.jsonl")]
    assert names == [example.id for example in read_examples(file)]
    assert len(set(names)) == 18


def test_a_link_into_a_folder_that_is_not_there_makes_none(task, tmp_path, capsys):
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "nowhere" / "x.jsonl")
    assert convert(f"{task.data}/train.jsonl", "--out", str(link)) == 2
    assert f"no such folder {tmp_path / 'nowhere'}; make it first" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [link]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("{data}/none.jsonl --out o", 2, "none.jsonl: no such file"),
        ("{data}/train.jsonl --out {data}/test.jsonl", 2, "exists; remove it"),
        ("{data}/train.jsonl --out {tmp}/no/o.jsonl", 2, "make it first"),
        ("{data}/train.jsonl --out {tmp}/o --weights w", 2, "use --to stepwise"),
        ("{data}/train.jsonl --out {tmp}/o --to stepwise --weights {tmp}/w", 2, "no such file"),
        ("{data}/train.jsonl --out {tmp}/o --format stepwise", 1, "train.jsonl:1: field prompt"),
        (
            "{data}/train.jsonl --out {tmp}/o --image-root {tmp}",
            1,
            "images[0]: expected a readable",
        ),
        ("{data}/train.jsonl", 2, "missing --out"),
    ],
)
def test_mistakes(task, tmp_path, capsys, words, status, message):
    given = words.format(data=task.data, tmp=tmp_path).split()
    assert convert(*given) == status
    said = capsys.readouterr().err
    assert said.startswith("bilevel-prm data convert: ")
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_images_outside_their_folder_are_refused_by_every_command(task, tmp_path, capsys):
    rows = read_lines(task.data / "train.jsonl")[:2]
    for row in rows:
        row["images"] = [str(task.data / image) for image in row["images"]]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = [
        ["data", "convert", str(source), "--out", str(tmp_path / "out.jsonl")],
        ["data", "split", str(source), "--out", str(tmp_path / "out"), "--parts", "a=rest"],
        ["data", "inspect", str(source), "--model", str(task.model)],
        ["data", "validate", str(source)],
    ]
    for words in commands:
        assert main(words) == 1, words
        said = capsys.readouterr()
        assert "expected an image below" in said.err + said.out
        assert main([*words, "--allow-outside-images"]) == 0, words
        capsys.readouterr()


def test_options_resolve():
    from recipes.data_files.options import ConvertOptions

    assert resolve(ConvertOptions, {"file": "f", "out": "o"}).to == "prm-jsonl"


def test_the_root_of_the_images_is_not_told_for_a_file_without_images(tmp_path, capsys):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "1+1?", "completions": ["2"], "labels": [true]}\n')
    assert convert(source, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}: 1 examples\n"


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("x.jsonl.gz", "x.jsonl"),
        ("x.parquet", "x.jsonl"),
        ("x.JSON.ZST", "x.JSON"),
        ("x.csv", "x.jsonl"),
    ],
)
def test_a_name_that_promises_another_kind_of_file_is_refused(task, tmp_path, capsys, name, better):
    source, out = task.data / "train.jsonl", tmp_path / name
    commands = [
        ["data", "convert", source, "--out", out],
        ["data", "split", source, "--out", out, "--parts", "a=rest"],
        ["data", "validate", source, "--json", out],
    ]
    for words in commands:
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert "what is written is plain JSON, not" in error
        assert error.rstrip().endswith(f"name it {better}")
    assert not any(tmp_path.iterdir())


def test_the_folder_of_the_parts_is_not_named_as_a_file(task, tmp_path, capsys):
    words = ["data", "split", task.data / "train.jsonl", "--out", tmp_path / "x.jsonl"]
    assert main([str(word) for word in [*words, "--parts", "a=rest"]]) == 2
    assert "is a directory to make" in capsys.readouterr().err
