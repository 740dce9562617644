"""``data inspect`` shows what the model gets: the positions it names are those that are scored."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from prm.data.reader import read_jsonl, write_jsonl
from prm.data_urls import embedded, shown
from prm.models.model import load_prm
from recipes.__main__ import main
from recipes.embedded.vocabulary import SYSTEM_PROMPT


@pytest.fixture
def show(task, capsys):
    def run(*words) -> str:
        model = ["--model", str(task.model), "--system-prompt", SYSTEM_PROMPT]
        assert main(["data", "inspect", *map(str, words), *model]) == 0
        return capsys.readouterr().out

    return run


def test_page(task, show, tmp_path):
    file = task.data / "train.jsonl"
    example = read_jsonl(file)[2]
    collator = load_prm(task.model).collator(system_prompt=SYSTEM_PROMPT, max_patches=6)
    encoded = collator.encode(example)
    weights = tmp_path / "weights.jsonl"
    weights.write_text(json.dumps({"id": example.id, "weight": 0.625}) + "\n")
    page = show(file, "--row", 3, "--weights", weights, "--tokens")
    lines = page.splitlines()
    assert lines[0] == f"{file}:3 (prm-jsonl)"
    assert f"id        {example.id}" in lines
    assert "weight    0.625" in lines
    assert f"image     {example.images[0]}  32 x 32 pixels, 1 tiles" in lines
    count = len(encoded.input_ids)
    assert f"tokens    {count}, scored at {len(example.steps)} of them" in lines
    positions = encoded.label_positions.tolist()
    start = lines.index("step  label  position  behind token   text")
    for number, (step, place) in enumerate(zip(example.steps, positions, strict=True)):
        words = lines[start + 1 + number].split(maxsplit=4)
        sign = "+" if step.label == 1 else "-"
        assert words == [str(number), sign, str(place), "'assistant'", step.text]
    listed = lines[lines.index("position  token") + 1 :]
    scored = [line for line in listed if "judgement of step" in line]
    assert [int(line.split()[0]) for line in scored] == positions
    # Every token is listed once, runs of the same one together.
    tokens = []
    for line in listed:
        place, token, *rest = line.split()
        assert int(place) == len(tokens)
        times = int(rest[rest.index("x") + 1]) if " x " in line else 1
        tokens += [int(token)] * times
    assert tokens == encoded.input_ids.tolist()


def test_a_picture_in_the_row_is_shown_by_its_start(task, show, tmp_path):
    example = read_jsonl(task.data / "train.jsonl")[2]
    picture = embedded(example.images[0].read_bytes())
    write_jsonl(tmp_path / "own.jsonl", [replace(example, images=(picture,))])
    (line,) = [x for x in show(tmp_path / "own.jsonl").splitlines() if x.startswith("image")]
    assert line == f"image     {shown(picture)}  32 x 32 pixels, 1 tiles"
    assert len(line) < 120


def test_soft_and_missing_labels_and_candidates(task, show, tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [{"question": "what is A1 ?", "candidates": ["A1= 3\n\nA1= 4", "A1= 5"]}]
    rows[0]["true_false"] = [True, False]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = show(path, "--candidate", 1)
    assert "correct   False" in page
    assert "A1= 5" in page
    assert "none" in page
    soft = tmp_path / "soft.jsonl"
    steps = [{"text": "A1= 3", "label": 0.25}]
    soft.write_text(json.dumps({"id": "a", "question": "what is A1 ?", "steps": steps}) + "\n")
    assert " 0.25 " in show(soft)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--row 99", 2, "--row 99: {file} has 18 rows, counted from 1"),
        ("--row 0", 2, "--row: expected 1 or more, found 0"),
        ("--candidate 1", 2, "--candidate 1: row 1 has 1, counted from 0"),
        ("--format stepwise", 1, "{file}:1: field prompt"),
        ("--weights {file}", 1, "field weight: expected"),
        ("--model ./none", 2, "--model ./none"),
    ],
)
def test_mistakes(task, capsys, words, status, message):
    file = task.data / "train.jsonl"
    given = ["--model", str(task.model), *words.format(file=file).split()]
    assert main(["data", "inspect", str(file), *given]) == status
    assert message.format(file=file) in capsys.readouterr().err
