"""``relabel``: learned labels put into a data file, and the rules, by hand."""

from __future__ import annotations

import json

import pytest

from prm.digests import write_digest
from prm.models.model import load_prm
from recipes import commands
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.evaluation.candidates import step_scores_of
from recipes.models.loading import read_examples
from recipes.options.use import RelabelOptions
from tests.tiny_task import read_lines


def row(name, labels, **more):
    steps = [{"text": f"step {n}", "label": label} for n, label in enumerate(labels)]
    return {"id": name, "question": f"question of {name}", "steps": steps} | more


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def labels_of(path):
    return {one["id"]: [step["label"] for step in one["steps"]] for one in read_lines(path)}


@pytest.fixture
def relabel(tmp_path, capsys):
    def run(file, **more):
        output = tmp_path / "new.jsonl"
        options = RelabelOptions(file=str(file), output=str(output), overwrite=True, **more)
        status = commands.run("relabel", options)
        said = capsys.readouterr()
        return (labels_of(output), said.out) if status == 0 else (None, said.err)

    return run


@pytest.fixture
def learned(tmp_path):
    """A data file, and what a run has learned on it: one label turned over, one soft one moved."""
    data = write(tmp_path / "train.jsonl", [row("a", ["+", "-", None]), row("b", [0.3])])
    entries = [
        {"id": "a", "given": [1.0, 0.0, None], "learned": [0.9375, 0.75, None]},
        {"id": "b", "given": [0.30000001192092896], "learned": [0.25]},
    ]
    return data, write(tmp_path / "labels.jsonl", entries)


def test_learned_labels_take_the_place_of_those_given(relabel, learned):
    data, labels = learned
    found, said = relabel(data, labels=str(labels))
    assert found == {"a": [0.9375, 0.75, None], "b": [0.25]}
    assert "2 examples; 1 of 3 labels were turned over" in said


def test_labels_of_other_data_are_refused(relabel, learned, tmp_path):
    data, labels = learned
    write(data, [row("a", ["+", "+", None]), row("b", [0.3])])
    assert (
        ":1: field steps[].label: expected an example of the run"
        in relabel(data, labels=str(labels))[1]
    )
    write(data, [row("c", ["+"])])
    assert "found 'c', which is not among them" in relabel(data, labels=str(labels))[1]
    assert "--by learned needs --labels" in relabel(data)[1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"id": "a", "given": [1.0], "learned": [2.0]},
            "field learned: expected a list of numbers",
        ),
        (
            {"id": "a", "given": [1.0], "learned": [True]},
            "field learned: expected a list of numbers",
        ),
        ({"id": "a", "given": [1.0], "learned": [None]}, "a label where one was given, [1.0]"),
        ({"given": [1.0], "learned": [0.5]}, "field id: expected an id that no other line has"),
        ("a", "expected an object with id, given and learned, found 'a'"),
    ],
)
def test_damaged_labels_are_refused(relabel, learned, entry, message):
    data, labels = learned
    write(labels, [entry])
    assert message in relabel(data, labels=str(labels))[1]


def test_a_file_that_was_changed_after_the_run_is_refused(relabel, learned):
    data, labels = learned
    write_digest(labels)
    labels.write_text(labels.read_text().replace("0.75", "0.25"))
    assert (
        "the content whose SHA-256 stands in labels.jsonl.sha256"
        in relabel(data, labels=str(labels))[1]
    )


def test_nait_takes_the_scores_that_are_far_from_labels(task, relabel):
    train = task.data / "train.jsonl"
    asked = {"model": str(task.model), "system_prompt": SYSTEM_PROMPT}
    asked |= {"allow_outside_images": True, "image_root": str(task.data)}
    found, said = relabel(train, by="nait", threshold=0.5, **asked)
    prm = load_prm(task.model)
    options = RelabelOptions(file=str(train), output="-", by="nait", **asked)
    data = read_examples(prm, options, str(train))
    scores, _ = step_scores_of(prm, {}, data, options)
    turned = 0
    for place, example in enumerate(data.examples):
        for step, given in enumerate(one.label for one in example.steps):
            score = float(scores[place, step])
            expected = score if abs(score - given) > 0.5 else {1.0: "+", 0.0: "-"}[given]
            assert found[example.id][step] == pytest.approx(expected, abs=1e-6)
            turned += abs(score - given) > 0.5
    assert turned > 0
    assert f"{turned:,} of " in said


def test_scan_has_the_rule_and_the_selection_of_the_paper(relabel, tmp_path):
    data = write(
        tmp_path / "rollouts.jsonl",
        [
            row("soft", [0.75, 0.5, 0.375, 0.25, "-", 0.5], self_confidence=0.75),
            row("right", [0.25, "-", 0.5], self_confidence=0.75, correct=True),
            row("unsure", ["+", "-"], self_confidence=0.0),
            row("no failure", [0.25, 0.5], self_confidence=0.8, correct=False),
            row("unknown", [0.25, 0.5], self_confidence=0.8),
        ],
    )
    found, said = relabel(data, by="scan")
    assert found == {
        "soft": ["+", "+", 0.5, pytest.approx(1 / 3), "-", None],
        "right": ["+", "+", "+"],
        "unknown": ["+", "+"],
    }
    assert "3 examples, 2 left out" in said
    found, _ = relabel(data, by="scan", tolerance=0, least_confidence=0.8)
    assert found == {"unknown": ["+", "+"]}


@pytest.mark.parametrize("value", [None, 1.5, True, "0.5"])
def test_scan_needs_the_confidence_of_every_row(relabel, tmp_path, value):
    more = {} if value is None else {"sc": value}
    data = write(tmp_path / "rollouts.jsonl", [row("a", ["+", "-"], **more)])
    _, error = relabel(data, by="scan", confidence="sc")
    assert "rollouts.jsonl:1: field sc: expected the share of the sampling model's" in error


def test_what_a_rule_does_not_read_is_refused(relabel, learned):
    data, labels = learned
    assert (
        "--threshold: no effect with --by learned"
        in relabel(data, labels=str(labels), threshold=0.5)[1]
    )
    assert "--labels: no effect with --by scan" in relabel(data, by="scan", labels=str(labels))[1]
    assert "--model: no effect with --by scan" in relabel(data, by="scan", model="m")[1]
