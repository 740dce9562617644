"""Whole runs on a tiny task: what a run directory holds, and that it can be relied on."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import recipes.train.training
from prm.digests import check_digest
from prm.models.model import load_prm
from prm.schema import Step, StepExample
from prm.scoring import score_examples, step_scores
from recipes.__main__ import main
from recipes.evaluation.candidates import step_scores_of
from recipes.models.loading import load_model, read_examples
from recipes.options.parse import changed, resolve
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.run.errors import WriteError
from recipes.train.cold_start import run_cold_start
from recipes.train.reports.weights import initial_losses
from recipes.train.training import run_training
from tests.tiny_task import SIZES, altered, model_bits, read_lines
from weighting import Clip, DomainTable, InstanceNet, InstanceTable, Sigmoid, load_weighting

COLD = {"args.yaml", "env.json", "log.jsonl", "model", "results.json"}
ALWAYS = COLD | {"test_questions.jsonl", "dev_questions.jsonl"}
ALWAYS |= {"weights.jsonl", "weights.jsonl.sha256"}
WEIGHTED = {"weighting", "cache", "extreme_weights.jsonl"}
KINDS = {
    "net": ({"weighting": "net"}, "instance_net"),
    "table": ({"weighting": "table", "bound": "clip"}, "instance_table"),
    "domain": ({"weighting": "domain", "bound": "softplus"}, "domain_table"),
    "none": ({"weighting": "none"}, "no_selection"),
    "meta": ({"weighting": "none", "lower_data": "meta"}, "meta_only"),
    "given": ({"weighting": "none"}, "fixed_weights"),
}
TRAINED = 18  # examples


@pytest.fixture(scope="module")
def cold(task, tmp_path_factory):
    return run_cold_start(task.cold_start(tmp_path_factory.mktemp("cold") / "run"))


@pytest.fixture(scope="module")
def runs(task, cold, tmp_path_factory):
    """Each kind of run from the cold start, made when it is first asked for."""
    directory = tmp_path_factory.mktemp("runs")

    def get(kind: str):
        if not (directory / kind).exists():
            more = dict(KINDS[kind][0])
            if kind == "given":
                more["weights_file"] = str(get("table") / "weights.jsonl")
            files = {"init_from": str(cold / "model"), "dev_file": str(task.data / "dev.jsonl")}
            run_training(task.train(directory / kind, **files, **more))
        return directory / kind

    return get


def options_of(run):
    return resolve(TrainOptions, {"config": str(run / "args.yaml")})


ASKED = {"context": "plus", "max_patches": 6}
"""What args.yaml holds of the prompt where neither the options nor the model say it."""


def test_cold_start_directory(task, cold):
    assert {path.name for path in cold.iterdir()} == COLD
    results = json.loads((cold / "results.json").read_text())
    assert results["examples"] == 10
    assert results["rows"] == {}
    log = read_lines(cold / "log.jsonl")
    assert [(entry["phase"], entry["step"]) for entry in log] == [
        ("cold start", 1), ("cold start", 2), ("cold start", 3),
    ]  # fmt: skip
    assert all(entry["weights/mean"] == entry["weights/ess"] == 1.0 for entry in log)
    options = resolve(ColdStartOptions, {"config": str(cold / "args.yaml")})
    assert options == replace(task.cold_start(cold), **ASKED)
    # What is frozen stayed, the rest moved.
    before, after = load_prm(task.model).model, load_prm(cold / "model").model
    for name, value in before.named_parameters():
        assert torch.equal(value, after.get_parameter(name)) == ("vision_tower" in name), name


@pytest.mark.parametrize("kind", KINDS)
def test_run_directory_holds_what_the_contract_says(runs, kind):
    run = runs(kind)
    weighted = kind in ("net", "table", "domain")
    files = {path.name for path in run.iterdir()}
    assert files == ALWAYS | (WEIGHTED if weighted else set())
    assert not list(run.rglob("*.unfinished"))
    assert check_digest(run / "weights.jsonl")
    environment = json.loads((run / "env.json").read_text())
    assert environment["packages"]["torch"] == metadata.version("torch")
    assert {"python", "platform", "cpus", "threads", "cuda"} <= set(environment)


@pytest.mark.parametrize("kind", KINDS)
def test_results(task, runs, kind):
    results = json.loads((runs(kind) / "results.json").read_text())
    weighted = kind in ("net", "table", "domain")
    own = KINDS[kind][1]
    keys = {
        "rows",
        "ci95",
        "n_questions",
        "seed",
        "seconds",
        "signs",
        "step_auc",
        "step_macro_f1",
        "best_of_k",
        "pass_at_k",
        "dev",
    }
    keys |= {"troubles"}
    assert set(results) == keys | (
        {"sources", "weight_auc", "weight_label_correlation"} if weighted else set()
    )
    assert list(results["rows"]) == ["pass@1", "self_consistency", own, "pass@4"]
    assert results["n_questions"] == SIZES.test_questions
    assert results["dev"]["n_questions"] == SIZES.dev_questions
    assert results["seed"] == 0
    assert not any(kind.endswith(("finite", "exploded")) for kind in results["troubles"])
    assert set(results["seconds"]) == {"set_up", "train", "evaluate"}
    assert all(second >= 0 for second in results["seconds"].values())
    for part in (results, results["dev"]):
        for name, mean in part["rows"].items():
            low, high = part["ci95"][name]
            assert 0 <= low <= mean <= high <= 1
        assert part["rows"]["pass@1"] <= part["rows"]["pass@4"]
        assert part["rows"][own] <= part["rows"]["pass@4"]
    # The rows are the means of the questions, and those that no model touches those of the data.
    questions = read_lines(runs(kind) / "test_questions.jsonl")
    assert [entry["question"] for entry in questions] == [f"test-{n:04d}" for n in range(5)]
    for name, mean in results["rows"].items():
        assert mean == pytest.approx(sum(entry[name] for entry in questions) / 5, abs=5e-5)
    right = Counter(row["group"] for row in read_lines(task.data / "test.jsonl") if row["correct"])
    assert [entry["pass@1"] for entry in questions] == [
        right[entry["question"]] / 4 for entry in questions
    ]
    if weighted:
        assert set(results["sources"]) == {"verified", "judge", "crowd", "guideline"}
        assert 0 <= results["weight_auc"] <= 1


def test_extremes_have_the_scores_of_the_saved_model(task, runs):
    run = runs("table")
    weights = {row["id"]: row["weight"] for row in read_lines(run / "weights.jsonl")}
    found = read_lines(run / "extreme_weights.jsonl")
    ordered = sorted(weights.values(), reverse=True)
    assert [row["weight"] for row in found] == ordered[:6] + ordered[::-1][:6]
    assert all(weights[row["id"]] == row["weight"] for row in found)
    options = options_of(run)
    prm, params = load_model(options, path=str(run / "model"))
    data = read_examples(prm, options, options.train_file)
    scores, mask = step_scores_of(prm, params, data, options)
    index = data.index()
    for row in found:
        own = scores[index[row["id"]]][mask[index[row["id"]]]]
        assert row["step_scores"] == pytest.approx(own.tolist(), abs=1e-6)
        assert row["initial_scores"] != row["step_scores"]


def test_best_of_k_ends_at_the_rows(runs):
    for part in ("test", "dev"):
        results = json.loads((runs("net") / "results.json").read_text())
        results = results if part == "test" else results["dev"]
        assert results["best_of_k"][-1] == pytest.approx(results["rows"]["instance_net"], abs=1e-4)
        assert results["best_of_k"][0] == pytest.approx(results["rows"]["pass@1"], abs=1e-4)
        assert results["pass_at_k"][-1] == pytest.approx(results["rows"]["pass@4"], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_log_says_what_happened_at_each_step(runs, kind):
    log = read_lines(runs(kind) / "log.jsonl")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert {entry["phase"] for entry in log} == {KINDS[kind][1]}
    assert [entry["lower_lr"] for entry in log] == pytest.approx(
        [2e-3, 2e-3 * (2 + 2**0.5) / 4, 1e-3, 2e-3 * (2 - 2**0.5) / 4]
    )
    upper = ["upper_loss" in entry for entry in log]
    if kind in ("net", "table", "domain"):
        assert upper == [False, True, True, True]
        peak = log[0]["upper_lr"]
        assert [entry["upper_lr"] / peak for entry in log] == pytest.approx([1, 1, 0.75, 0.25])
        assert log[0]["weights/min"] == log[1]["weights/max"] == 1.0
        assert log[-1]["weights/min"] < 1 < log[-1]["weights/max"]
        assert log[-1]["weights/ess"] < 1
    else:
        assert upper == [False] * 4


@pytest.mark.parametrize("kind", ["net", "table", "domain"])
def test_weights_file_lists_every_example(task, runs, kind):
    rows = read_lines(runs(kind) / "weights.jsonl")
    data = read_lines(task.data / "train.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in data]
    assert set(rows[0]) == {"id", "weight", "raw_weight", "visits", "initial_loss"}
    assert sum(row["visits"] for row in rows) == 4 * 6
    assert {row["visits"] for row in rows} == {1, 2}  # an epoch is 18
    assert sum(row["weight"] for row in rows) / TRAINED == pytest.approx(1, abs=1e-5)
    assert len({row["weight"] for row in rows}) > 1


def test_initial_loss_is_that_of_the_start(task, cold, runs):
    options = options_of(runs("net"))
    prm, params = load_model(options, path=str(cold / "model"))
    data = read_examples(prm, options, options.train_file)
    scores = score_examples(prm, params, data.encoded, data.collator, 5)
    for row, plus, example in zip(
        read_lines(runs("net") / "weights.jsonl"), scores, data.examples, strict=True
    ):
        labels = torch.tensor([step.label for step in example.steps])
        expected = torch.nn.functional.binary_cross_entropy(plus, labels)
        assert row["initial_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("net", InstanceNet(5, bound=Sigmoid(2.0))),
        ("table", InstanceTable(TRAINED, bound=Clip(0.0, 2.0))),
        ("domain", DomainTable(3)),
    ],
)
def test_weighting_loads_and_gives_the_listed_weights(task, runs, kind, expected):
    weighting, params, ids, extra = load_weighting(runs(kind) / "weighting")
    assert weighting == expected
    inputs = {"features": ["label", "p_label", "p_plus"], "reference": True, "domains": []}
    assert extra == (inputs if kind == "net" else {})
    rows = read_lines(runs(kind) / "weights.jsonl")
    data = read_lines(task.data / "train.jsonl")
    if isinstance(weighting, InstanceTable):
        assert ids == tuple(row["id"] for row in data)
        assert weighting.all_weights(params).tolist() == [row["weight"] for row in rows]
        assert weighting.raw_weights(params).tolist() == [row["raw_weight"] for row in rows]
    elif isinstance(weighting, DomainTable):
        assert set(ids) == {row["domain"] for row in data}
        by_domain = dict(zip(ids, weighting.raw_weights(params).tolist(), strict=True))
        assert [row["raw_weight"] for row in rows] == [by_domain[row["domain"]] for row in data]
    else:
        assert ids == ()
        raw = torch.tensor([row["raw_weight"] for row in rows])
        weights = 2 * torch.sigmoid(raw - raw.mean())
        expected_weights = (weights / weights.mean()).tolist()
        assert [row["weight"] for row in rows] == pytest.approx(expected_weights, rel=1e-5)


def test_net_weights_are_those_of_the_saved_net_on_the_saved_model(task, cold, runs):
    """What was saved suffices to weigh new examples: net, model, and the model it started from."""
    weighting, params, _, _ = load_weighting(runs("net") / "weighting")
    options = options_of(runs("net"))
    scores = []
    for model in (runs("net") / "model", cold / "model"):
        prm, lower = load_model(options, path=str(model))
        data = read_examples(prm, options, options.train_file)
        scores.append(step_scores_of(prm, lower, data, options)[0])
    labels = torch.tensor([[step.label for step in e.steps] for e in data.examples])
    now, before = ([labels * p + (1 - labels) * (1 - p), p] for p in scores)
    features = torch.stack([labels, *now, *before], -1)
    raw = weighting.raw_weights(params, features, torch.ones(labels.shape, dtype=torch.bool))
    listed = [row["raw_weight"] for row in read_lines(runs("net") / "weights.jsonl")]
    assert raw.tolist() == pytest.approx(listed, rel=1e-5)


def test_model_loads_with_plain_transformers_and_scores_the_same(runs):
    directory = runs("net") / "model"
    model = AutoModelForImageTextToText.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    AutoImageProcessor.from_pretrained(directory, backend="pil")
    labels = tokenizer.convert_tokens_to_ids(["+", "-"])
    options = options_of(runs("net"))
    prm, params = load_model(options, path=str(directory))
    data = read_examples(prm, options, options.data.test_file)
    scores, mask = step_scores_of(prm, params, data, options)
    batch = data.batch(range(len(data)))
    with torch.no_grad():
        logits = model(
            **{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        ).logits
    read = torch.take_along_dim(logits, batch["label_positions"][..., None], dim=1)
    torch.testing.assert_close(step_scores(read[..., labels])[mask], scores[mask])


@pytest.mark.parametrize("kind", KINDS)
def test_args_read_back(task, cold, runs, kind):
    more = dict(KINDS[kind][0])
    if kind == "given":
        more["weights_file"] = str(runs("table") / "weights.jsonl")
    files = {"init_from": str(cold / "model"), "dev_file": str(task.data / "dev.jsonl")}
    given = task.train(runs(kind), **files, **more)
    assert options_of(runs(kind)) == replace(given, **ASKED)


@pytest.mark.parametrize("kind", ["net", "table"])
def test_same_seed_same_bits_other_seed_others(runs, tmp_path, kind):
    options = options_of(runs(kind))
    again = run_training(replace(options, output_dir=str(tmp_path / "again")))
    assert model_bits(again) == model_bits(runs(kind))
    for name in ("weights.jsonl", "log.jsonl", "test_questions.jsonl"):
        assert (again / name).read_bytes() == (runs(kind) / name).read_bytes()
    other = run_training(replace(options, output_dir=str(tmp_path / "other"), seed=1))
    assert model_bits(other) != model_bits(again)
    assert json.loads((other / "results.json").read_text())["seed"] == 1


@pytest.mark.parametrize("kind", ["net", "none"])
def test_evaluate_command_finds_what_the_run_found(task, runs, tmp_path, capsys, kind):
    words = ["evaluate", "--model", str(runs(kind) / "model"), "--seed", "9"]
    words += ["--file", str(task.data / "test.jsonl"), "--output", str(tmp_path / "found.json")]
    words += ["--threshold", "0.5"]  # the model's is the best on the development set
    assert main(words) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    results = json.loads((runs(kind) / "results.json").read_text())
    own = KINDS[kind][1]
    for name in ("rows", "ci95"):
        expected = {"prm" if row == own else row: v for row, v in results[name].items()}
        assert {row: v for row, v in found[name].items() if row != "weighted_vote"} == expected
    assert found["n_questions"] == results["n_questions"]
    for name in ("step_auc", "step_macro_f1"):
        assert found[name] == round(results[name], 4)
    assert "best-of-N accuracy" in capsys.readouterr().out


def test_given_weights_are_used(runs):
    """Weights of the table, fixed: not the table's run (they moved there), not No Selection."""
    assert len({model_bits(runs(kind)) for kind in ("given", "table", "none")}) == 3
    log = read_lines(runs("given") / "log.jsonl")
    assert all(entry["weights/mean"] == pytest.approx(1) for entry in log)
    assert all(entry["weights/ess"] < 1 for entry in log)


@pytest.mark.parametrize("kind", ["none", "given", "meta"])
def test_weights_file_of_a_run_without_weighting(task, runs, kind):
    """The examples that the lower level saw, the weight that each of them had, and how often."""
    rows = read_lines(runs(kind) / "weights.jsonl")
    data = read_lines(task.data / ("meta.jsonl" if kind == "meta" else "train.jsonl"))
    assert [row["id"] for row in rows] == [row["id"] for row in data]
    assert {tuple(row) for row in rows} == {("id", "weight", "raw_weight", "visits")}
    assert {row["raw_weight"] for row in rows} == {None}
    given = [row["weight"] for row in read_lines(runs("table") / "weights.jsonl")]
    assert [row["weight"] for row in rows] == (given if kind == "given" else [1.0] * len(data))
    visits = [row["visits"] for row in rows]
    assert sum(visits) == 4 * 6
    assert max(visits) - min(visits) == (0 if kind == "meta" else 1)  # two epochs of 12; 1⅓ of 18


def test_training_set_is_scored_once_before_the_run_and_only_where_that_is_read(
    task, tmp_path, monkeypatch
):
    scored = []

    def counting(prm, params, data, options):
        scored.append(data.path.name)
        return step_scores_of(prm, params, data, options)

    monkeypatch.setattr(recipes.train.training, "step_scores_of", counting)
    for name in ("none", "table", "domain", "net"):
        scored.clear()
        run_training(task.train(tmp_path / name, steps=1, test_file=None, **KINDS[name][0]))
        assert scored == ([] if name == "none" else ["train.jsonl"])


def test_initial_losses_are_those_of_the_scores():
    """Soft labels, steps without one, and scores at which float32 has run out."""
    steps = ([1.0, 0.25], [None, 0.0, 1.0], [0.0], [1.0])
    examples = [
        StepExample("", "?", (), tuple(Step("s", label) for label in labels)) for labels in steps
    ]
    scores = torch.tensor(
        [[0.5, 0.75, 0.0], [0.125, 0.25, 0.875], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0]], dtype=torch.bool)
    found = initial_losses(scores, mask, SimpleNamespace(examples=examples))
    expected = [
        -(math.log(0.5) + 0.25 * math.log(0.75) + 0.75 * math.log(0.25)) / 2,
        -(math.log(0.75) + math.log(0.875)) / 2,
        25 * math.log(2),
        25 * math.log(2),
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_meta_run_minimises_the_meta_loss(task, runs, tmp_path):
    more = {"weighting": "none", "lower_data": "meta", "batch_size": 12, "steps": 12}
    run = run_training(task.train(tmp_path / "run", lower_lr=5e-3, **more))
    log = read_lines(run / "log.jsonl")
    assert log[-1]["lower_loss"] < log[0]["lower_loss"]
    # Before it moved: (mean p - correct)² over the meta set, all of it in the batch.
    prm, params = load_model(options_of(run))
    data = read_examples(prm, options_of(run), options_of(run).data.meta_file)
    scores, mask = step_scores_of(prm, params, data, options_of(run))
    mean = (scores * mask).sum(1) / mask.sum(1)
    right = torch.tensor([float(bool(example.correct)) for example in data.examples])
    assert log[0]["lower_loss"] == pytest.approx(float(((mean - right) ** 2).mean()), rel=1e-5)


def test_meta_run_on_whole_questions(task, tmp_path):
    """The pair loss of the first batch, before anything moved, by its formula."""
    more = {"weighting": "none", "lower_data": "meta", "loss_target": "pairs", "batch_size": 12}
    run = run_training(task.train(tmp_path / "run", steps=1, **more))
    options = options_of(run)
    prm, params = load_model(options)
    data = read_examples(prm, options, options.data.meta_file)
    scores, mask = step_scores_of(prm, params, data, options)
    mean = ((scores * mask).sum(1) / mask.sum(1)).tolist()
    pairs = [
        (mean[i] - mean[j] - 1) ** 2
        for i, one in enumerate(data.examples)
        for j, other in enumerate(data.examples)
        if one.group == other.group and one.correct and not other.correct
    ]
    assert read_lines(run / "log.jsonl")[0]["lower_loss"] == pytest.approx(
        sum(pairs) / len(pairs), rel=1e-5
    )


def test_pairs_need_one_mixed_question_only_and_resume_to_the_same_bits(task, tmp_path, capsys):
    """One of six questions is mixed, and every meta batch holds it."""
    order: list[str] = []

    def all_alike(place, row):
        order.append(row["group"])
        return row if row["group"] == order[0] else row | {"correct": row["group"] < order[0]}

    meta = altered(task.data / "meta.jsonl", tmp_path / "meta.jsonl", all_alike)
    more = {"meta_file": str(meta), "loss_target": "pairs", "meta_batch_size": 1, "steps": 6}
    whole = run_training(task.train(tmp_path / "whole", **more))
    assert "1 of 6 questions have right and wrong solutions" in capsys.readouterr().out
    assert len(read_lines(whole / "log.jsonl")) == 6
    run = run_training(task.train(tmp_path / "run", save_every=3, **more))
    (run / "results.json").unlink()
    run_training(changed(options_of(run), resume=str(run / "checkpoints" / "step-3")))
    assert model_bits(run) == model_bits(whole)
    assert (run / "weights.jsonl").read_bytes() == (whole / "weights.jsonl").read_bytes()


def test_no_steps_at_all_evaluates_the_start(task, cold, tmp_path):
    files = {"weighting": "none", "init_from": str(cold / "model")}
    run = run_training(task.train(tmp_path / "run", steps=0, **files))
    assert model_bits(run) == model_bits(cold)
    assert "no_selection" in json.loads((run / "results.json").read_text())["rows"]
    assert not (run / "log.jsonl").exists()


def test_upper_steps_come_when_they_are_due(task, tmp_path):
    run = run_training(task.train(tmp_path / "run", steps=8, upper_start=2, unroll_steps=3))
    log = read_lines(run / "log.jsonl")
    assert [entry["step"] for entry in log if "upper_loss" in entry] == [5, 8]


def test_log_lines_are_means_over_their_steps(task, tmp_path):
    fine = run_training(task.train(tmp_path / "fine", steps=5))
    coarse = run_training(task.train(tmp_path / "coarse", steps=5, log_every=3))
    one, other = read_lines(fine / "log.jsonl"), read_lines(coarse / "log.jsonl")
    assert [entry["step"] for entry in other] == [3, 5]
    for line, part in zip(other, (one[:3], one[3:]), strict=True):
        for name in ("lower_loss", "weights/max"):
            mean = sum(entry[name] for entry in part) / len(part)
            assert line[name] == pytest.approx(mean, rel=1e-12)
    assert other[0]["upper_loss"] == pytest.approx(
        (one[1]["upper_loss"] + one[2]["upper_loss"]) / 2
    )


def test_cold_start_draws_by_seed(task, tmp_path):
    bits = {
        seed: model_bits(run_cold_start(task.cold_start(tmp_path / str(number), seed=seed)))
        for number, seed in enumerate((0, 1))
    }
    assert bits[0] != bits[1]
    whole = run_cold_start(task.cold_start(tmp_path / "all", draw=0))
    assert json.loads((whole / "results.json").read_text())["examples"] == TRAINED


def test_a_directory_that_cannot_be_written_is_said_before_the_model_is_loaded(
    task, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(recipes.train.training, "load_trained", None)
    with pytest.raises(WriteError, match=r"cannot be written \(Not a directory\)"):
        run_training(task.train(tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "mine"
