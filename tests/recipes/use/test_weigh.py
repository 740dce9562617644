"""``weigh``: the weights of a run's own training file, and those of a file it has not seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from prm.models.model import load_prm
from recipes import commands
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.models.loading import read_examples
from recipes.options.use import WeighOptions
from recipes.train.training import run_training
from tests.tiny_task import read_lines
from weighting import load_weighting

FEATURES = ("label", "p_label", "steps", "length", "domain", "gradient")


@pytest.fixture(scope="module")
def runs(task, tmp_path_factory):
    """A run with a net on all kinds of features, one with a table, one with domains."""
    folder = tmp_path_factory.mktemp("runs")
    net = {"features": FEATURES, "gradient_features": 3}
    more = {"net": net, "table": {"bound": "clip"}, "domain": {}}
    bounds = {"domain": {"bound": "softplus"}}
    return {
        name: run_training(
            task.train(folder / name, weighting=name, steps=3, **given, **bounds.get(name, {}))
        )
        for name, given in more.items()
    }


@pytest.fixture
def weigh(task, runs, tmp_path):
    def run(name: str, file: Path | None = None, **more) -> tuple[int, list[dict]]:
        asked = {"system_prompt": SYSTEM_PROMPT} if name == "net" else {}
        asked |= {"model": str(runs[name] / "model")} if name == "net" else {}
        asked["weighting"] = str(runs[name] / "weighting")
        asked["file"] = str(file or task.data / "train.jsonl")
        output = str(tmp_path / "weights.jsonl")
        options = WeighOptions(output=output, overwrite=True, **{**asked, **more})
        status = commands.run("weigh", options)
        return status, read_lines(tmp_path / "weights.jsonl") if status == 0 else []

    return run


@pytest.fixture
def part(task):
    """Some of the training file's lines, changed, in a file beside it."""
    made = task.data / "part.jsonl"

    def write(rows: slice, **change) -> Path:
        lines = read_lines(task.data / "train.jsonl")[rows]
        made.write_text("".join(json.dumps(line | change) + "\n" for line in lines))
        return made

    yield write
    made.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["net", "table", "domain"])
def test_the_training_file_gets_the_weights_of_the_run(runs, weigh, name):
    status, found = weigh(name)
    expected = read_lines(runs[name] / "weights.jsonl")
    assert status == 0
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    for key in ("weight", "raw_weight"):
        assert [row[key] for row in found] == pytest.approx(
            [row[key] for row in expected], rel=1e-5
        )
    assert len({round(row["raw_weight"], 9) for row in found}) > 1


RULES = {
    "bis": {},
    "small-loss": {"system_prompt": SYSTEM_PROMPT},
    "random": {"seed": 3},
}


@pytest.mark.parametrize("by", list(RULES))
def test_rules_keep_a_share_and_training_takes_it(task, tmp_path, by):
    more = {"model": str(task.model)} if by == "small-loss" else {}
    file = task.data / "train.jsonl"
    options = WeighOptions(
        by=by, file=str(file), output=str(tmp_path / "w.jsonl"), keep=0.5, **RULES[by], **more
    )
    assert commands.run("weigh", options) == 0
    found = read_lines(tmp_path / "w.jsonl")
    rows = read_lines(file)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    kept = [row["raw_weight"] for row in found if row["weight"] == 1.0]
    left = [row["raw_weight"] for row in found if row["weight"] == 0.0]
    assert (len(kept), len(left)) == (len(rows) // 2, len(rows) - len(rows) // 2)
    assert min(kept) >= max(left)
    for row, example in zip(found, rows, strict=True):
        if by == "bis":
            labels = [step["label"] == "+" for step in example["steps"]]
            share = sum(labels) / len(labels)
            assert row["raw_weight"] == pytest.approx(share * (1 - share) + 0.05, rel=1e-12)
    run = run_training(
        task.train(
            tmp_path / "run", weighting="none", weights_file=str(tmp_path / "w.jsonl"), steps=2
        )
    )
    written = read_lines(run / "weights.jsonl")
    assert [row["weight"] for row in written] == [row["weight"] for row in found]
    if by == "small-loss":
        # What a run says of its start, which is this model.
        options = task.train(tmp_path / "net", weighting="net", steps=1)
        losses = [
            row["initial_loss"] for row in read_lines(run_training(options) / "weights.jsonl")
        ]
        assert [-row["raw_weight"] for row in found] == pytest.approx(losses, rel=1e-5)


def test_given_weights_are_normalised_over_the_file_or_not_at_all(task, tmp_path):
    """With one example per micro-batch, where a mean over the batch would undo every weight."""
    rows = read_lines(task.data / "train.jsonl")
    given = [float(place % 3) for place in range(len(rows))]
    file = tmp_path / "weights.jsonl"
    file.write_text(
        "".join(
            json.dumps({"id": r["id"], "weight": w}) + "\n"
            for r, w in zip(rows, given, strict=True)
        )
    )
    found = {}
    for normalise in ("table", "none"):
        more = {"weighting": "none", "weights_file": str(file), "normalise": normalise}
        run = run_training(
            task.train(tmp_path / normalise, **more, batch_size=1, steps=len(rows), test_file=None)
        )
        found[normalise] = [line["weights/mean"] for line in read_lines(run / "log.jsonl")]
        assert [row["weight"] for row in read_lines(run / "weights.jsonl")] == given
    assert sorted(found["none"]) == sorted(given)  # one epoch
    mean = sum(given) / len(given)
    assert found["table"] == pytest.approx([weight / mean for weight in found["none"]], rel=1e-6)
    options = task.train(tmp_path / "b", weighting="none", weights_file=str(file), batch_size=1)
    assert commands.run("train", options) == 1


def test_a_share_of_every_domain(task, tmp_path):
    options = WeighOptions(
        by="bis", file=str(task.data / "train.jsonl"), output=str(tmp_path / "w"), within="domain"
    )
    assert commands.run("weigh", options) == 0
    domains = [row["domain"] for row in read_lines(task.data / "train.jsonl")]
    kept = dict.fromkeys(domains, 0.0)
    for domain, row in zip(domains, read_lines(tmp_path / "w"), strict=True):
        kept[domain] += row["weight"]
    assert kept == {name: max(1, domains.count(name) // 4) for name in kept}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "--by weighting needs --weighting"),
        ({"weighting": "w", "keep": 0.5}, "--keep: no effect with --by weighting"),
        ({"by": "bis", "model": "m", "seed": 1}, "--model, --seed: no effect with --by bis"),
        ({"by": "random", "alpha": 0.1}, "--alpha: no effect with --by random"),
        ({"by": "bis", "keep": 0.0}, "--keep 0.0: keep_best needs a share in (0, 1]"),
        ({"by": "bis", "alpha": 0.0}, "--alpha 0.0: balanced_information needs a positive alpha"),
    ],
)
def test_rules_refuse(task, tmp_path, capsys, more, said):
    options = WeighOptions(file=str(task.data / "train.jsonl"), output=str(tmp_path / "w"), **more)
    assert commands.run("weigh", options) == 2
    assert said in capsys.readouterr().err


def test_a_saved_net_says_what_it_reads(task, runs):
    net, params, names, extra = load_weighting(runs["net"] / "weighting")
    lines = read_lines(task.data / "train.jsonl")
    domains = list(dict.fromkeys(line["domain"] for line in lines))
    assert extra == {"features": list(FEATURES), "reference": True, "domains": domains}
    assert names == ()
    # Label; twice p_label; number of steps, length; three of the gradient; one per domain.
    assert net.features == params["hidden.0.weight"].shape[1] == 1 + 2 + 2 + 3 + len(domains)


def test_a_net_weighs_examples_it_has_not_seen(runs, weigh, part):
    status, found = weigh("net", part(slice(4, 9), group="new"))
    assert status == 0
    expected = read_lines(runs["net"] / "weights.jsonl")[4:9]
    # The same raw weights; the weights are centred over this file and have mean 1 in it.
    raw = torch.tensor([row["raw_weight"] for row in expected])
    assert [row["raw_weight"] for row in found] == pytest.approx(raw.tolist(), abs=1e-6)
    net, *_ = load_weighting(runs["net"] / "weighting")
    weights = net.bound(raw - raw.mean() + net.bound.raw(net.prior))
    assert [row["weight"] for row in found] == pytest.approx(
        (weights / weights.mean()).tolist(), rel=1e-5
    )


def test_tables_weigh_a_part_of_what_they_know(runs, weigh, part):
    rows = read_lines(runs["table"] / "weights.jsonl")[3:5]
    _, found = weigh("table", part(slice(3, 5)))
    assert [row["weight"] for row in found] == pytest.approx([row["weight"] for row in rows])
    _, found = weigh("domain", part(slice(3, 5)))
    assert sum(row["weight"] for row in found) == pytest.approx(2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("table", {"id": "new-1"}, "field id: expected no other ids than the 18"),
        ("domain", {"domain": "algebra"}, "field domain: expected no other domains than"),
        ("net", {"domain": "algebra"}, "field domain: expected no other domains than"),
        ("domain", {"domain": None}, "part.jsonl:1: field domain: expected a name"),
    ],
)
def test_what_a_weighting_has_no_row_for_is_named(weigh, part, capsys, name, change, message):
    assert weigh(name, part(slice(2, 3), **change))[0] == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
    assert repr(next(iter(change.values()))) in line or change == {"domain": None}


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "table",
            {"model": "x", "context": "gold"},
            "--context, --model: no effect with the weighting InstanceTable",
        ),
        ("net", {"system_prompt": "judge"}, "--system-prompt judge: "),
        ("net", {"reference_model": "./none"}, "--reference-model ./none: --model ./none: expect"),
        ("net", {"file": "./none.jsonl"}, "./none.jsonl: no such file"),
        ("table", {"file": "./none.jsonl"}, "./none.jsonl: no such file"),
        ("net", {"weighting": "./none"}, "--weighting ./none: none/config.json: not found"),
    ],
)
def test_what_cannot_be_is_refused(weigh, capsys, name, more, message):
    assert weigh(name, **more)[0] == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_net_far_from_its_run_needs_the_initial_model_named(runs, weigh, tmp_path, task, capsys):
    shutil.copytree(runs["net"] / "weighting", tmp_path / "moved")
    assert weigh("net", weighting=str(tmp_path / "moved"))[0] == 2
    assert "give --reference-model" in capsys.readouterr().err
    status, found = weigh("net", weighting=str(tmp_path / "moved"), reference_model=str(task.model))
    assert status == 0
    expected = read_lines(runs["net"] / "weights.jsonl")
    assert [r["weight"] for r in found] == pytest.approx([r["weight"] for r in expected], rel=1e-5)


def test_example_features_are_those_of_the_batch(task, tmp_path):
    from prm.aggregations import AGGREGATIONS
    from recipes.method.objective import Objective

    options = task.train(tmp_path)
    data = read_examples(load_prm(task.model), options, options.train_file)
    domains = {"b": 0, str(data.examples[0].domain): 1}
    others = {str(e.domain) for e in data.examples} - set(domains)
    domains |= {name: 2 + place for place, name in enumerate(sorted(others))}
    index = {example.id: row for row, example in enumerate(data.examples)}
    batch = data.with_rows(index, domains).batch([0, 1])
    objective = Objective(
        None, AGGREGATIONS["mean"], "both", None, ("domain", "length", "steps"), False, len(domains)
    )
    probs = torch.full(batch["labels"].shape, 0.5)
    inputs, _ = objective.net_inputs(batch, {"step_probs": probs})
    for row in (0, 1):
        encoded = data.encoded[row]
        expected = [0.0] * len(domains)
        expected[domains[str(encoded.example.domain)]] = 1.0
        tokens = torch.log10(torch.tensor(float(len(encoded.input_ids)))) / 4
        steps = torch.log10(torch.tensor(1.0 + len(encoded.example.steps)))
        for step in range(inputs.shape[1]):
            assert inputs[row, step].tolist() == pytest.approx(
                [*expected, float(tokens), float(steps)]
            )


@pytest.mark.parametrize("name", ["config.json", "ids.json", "params.safetensors"])
def test_a_changed_byte_of_a_saved_weighting_is_named(runs, weigh, tmp_path, capsys, name):
    folder = tmp_path / "weighting"
    shutil.copytree(runs["table"] / "weighting", folder)
    assert weigh("table", weighting=str(folder))[0] == 0
    content = (folder / name).read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        (folder / name).write_bytes(
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        )
        capsys.readouterr()
        assert weigh("table", weighting=str(folder))[0] == 2
        said = capsys.readouterr().err
        assert f"{folder / name}: expected the content whose SHA-256 stands in {name}" in said
    (folder / name).write_bytes(content)
    for digest in folder.glob("*.sha256"):
        digest.unlink()
    assert weigh("table", weighting=str(folder))[0] == 0
    said = capsys.readouterr().err
    assert said == (
        f"note: {folder}/params.safetensors: no params.safetensors.sha256 beside it to check it "
        "with\n"
    )
