"""Evaluation on the dev set during training: it changes no step, and the best step is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import recipes.run.resume
import recipes.train.dev_evaluation
from bilevel.autodiff.random_state import capture
from prm.models.model import load_prm
from prm.schema import DataError
from recipes.__main__ import main
from recipes.evaluation.candidates import Evaluation
from recipes.options.rules import check_together
from recipes.options.values import OptionError
from recipes.run.checkpoints import Checkpoints, DevScore, Progress
from recipes.run.resume import Run
from recipes.train.dev_evaluation import DevEvaluation, best_of
from recipes.train.training import run_training
from tests.recipes.run.toy_problem import TOY, toy
from tests.tiny_task import altered, model_bits, read_lines

STEPS = 6


def short(task, output, **more):
    """Six steps, of which the dev set sees every second."""
    dev = str(task.data / "dev.jsonl")
    return task.train(output, **{"steps": STEPS, "dev_file": dev, "eval_every": 2, **more})


def logged(run, phase: str) -> list[dict]:
    return [line for line in read_lines(run / "log.jsonl") if line["phase"] == phase]


def with_accuracies(monkeypatch, *values: float) -> None:
    """Let the evaluations of a run find these accuracies, one after the other."""
    left = list(values)
    real = recipes.train.dev_evaluation.evaluate

    def evaluate(prm, params, candidates, options):
        found = real(prm, params, candidates, options)
        found.selected[:] = left.pop(0)
        return found

    monkeypatch.setattr(recipes.train.dev_evaluation, "evaluate", evaluate)


@pytest.fixture(scope="module")
def plain(task, tmp_path_factory):
    """The run that the dev set sees at its end alone, with a checkpoint of every second step."""
    more = {"eval_every": 0, "save_every": 2, "keep_checkpoints": 0}
    return run_training(short(task, tmp_path_factory.mktemp("plain") / "run", **more))


ACCURACIES = (0.25, 0.75, 0.5, 0.75)


@pytest.fixture(scope="module")
def best(task, tmp_path_factory):
    """The same run, of which step 2 is kept."""
    with pytest.MonkeyPatch.context() as patch:
        with_accuracies(patch, *ACCURACIES)
        return run_training(short(task, tmp_path_factory.mktemp("best") / "run", keep_best=True))


def test_evaluations_change_no_step(plain, best):
    assert logged(best, "instance_net") == logged(plain, "instance_net")
    last = (best / "last" / "model" / "model.safetensors").read_bytes()
    assert last == model_bits(plain)
    assert [line["step"] for line in logged(best, "dev")] == [0, 2, 4, 6]
    assert [line["best_of_n"] for line in logged(best, "dev")] == list(ACCURACIES)


def test_evaluations_change_no_step_in_place(task, tmp_path):
    more = {"execution": "resident", "weighting": "none", "steps": 3}
    plain = run_training(short(task, tmp_path / "plain", eval_every=0, **more))
    run = run_training(short(task, tmp_path / "run", **more))
    assert model_bits(run) == model_bits(plain)
    assert logged(run, "no_selection") == logged(plain, "no_selection")
    # The results come from another call, after the run.
    last = logged(run, "dev")[-1]
    results = json.loads((run / "results.json").read_text())
    assert results["dev"]["rows"]["no_selection"] == pytest.approx(last["best_of_n"], abs=5e-5)
    for name in ("step_auc", "step_macro_f1"):
        assert results["dev"][name] == last[name]
    assert results["model_selection"]["step"] == last["step"] == 3
    assert not (run / "last").exists()


def test_model_and_weights_are_those_of_the_best_step(plain, best):
    results = json.loads((best / "results.json").read_text())
    assert results["model_selection"] == {
        "step": 2,
        "best": {"step": 2, "best_of_n": 0.75},  # the earliest of two
        "last": {"step": 6, "best_of_n": 0.75},
    }
    # What the checkpoint of the run without evaluations holds after two steps.
    state = load_file(plain / "checkpoints" / "step-2" / "state.safetensors")
    model = load_prm(best / "model").model
    weighting = load_file(best / "weighting" / "params.safetensors")
    seen = {"lower_params": 0, "upper_params": 0}
    for name, value in state.items():
        _, level, own = [*name.split("/", 2), "", ""][:3]
        if level == "lower_params":
            assert torch.equal(value, model.get_parameter(own)), own
        if level == "upper_params":
            assert torch.equal(value, weighting[own]), own
        if level in seen:
            seen[level] += 1
    assert seen["upper_params"] == len(weighting)
    assert seen["lower_params"]
    assert sum(row["visits"] for row in read_lines(best / "weights.jsonl")) == 2 * 6
    assert not (best / "best").exists()


def test_a_run_killed_before_the_checkpoint_goes_on_to_the_same_bytes(
    task, tmp_path, best, monkeypatch
):
    class Killed(BaseException):
        """What no handler of errors sees, as it sees no kill."""

    save, run = recipes.run.resume.Run.save, tmp_path / "run"

    def killed_after_evaluation(self, progress, **more):
        if int(progress.state.lower_steps) == 4:
            raise Killed
        save(self, progress, **more)

    with monkeypatch.context() as patch:
        with_accuracies(patch, *ACCURACIES)
        patch.setattr(recipes.run.resume.Run, "save", killed_after_evaluation)
        with pytest.raises(Killed):
            run_training(short(task, run, keep_best=True, save_every=2))
    assert [line["step"] for line in logged(run, "dev")] == [0, 2, 4]
    assert {p.stem for p in (run / "best").glob("*.safetensors")} == {"step-2"}
    with_accuracies(monkeypatch, *ACCURACIES[2:])
    assert main(["train", "--resume", str(run), "--no-progress"]) == 0
    assert model_bits(run) == model_bits(best)
    for name in ("log.jsonl", "weights.jsonl", "last/model/model.safetensors"):
        assert (run / name).read_bytes() == (best / name).read_bytes(), name
    results, expected = (json.loads((r / "results.json").read_text()) for r in (run, best))
    assert results["model_selection"] == expected["model_selection"]


def toy_run(directory, dev=()) -> Run:
    state = toy()[1]
    checkpoints = Checkpoints(directory / "checkpoints", 0, 0, TOY)
    start = Progress(state, capture(state.lower_params), dev=dev)
    return Run("", directory, checkpoints, start, start)


def toy_evaluation(*accuracies: float, keeps_best: bool = True) -> DevEvaluation:
    found = [
        Evaluation(np.array([value]), None, None, None, torch.zeros(1)) for value in accuracies
    ]
    return DevEvaluation(
        2, 9, keeps_best, "dev.jsonl", "digest", "toy", False, lambda params: found.pop(0)
    )


def after(progress: Progress, steps: int) -> Progress:
    state = progress.state._replace(
        lower_params={"w": torch.full((1,), float(steps), dtype=torch.float64)},
        lower_steps=torch.tensor(steps),
    )
    return replace(progress, state=state)


def test_what_any_checkpoint_may_ask_for_stays(tmp_path):
    run, dev = toy_run(tmp_path), toy_evaluation(0.25, 0.5, 0.5, 0.75, 0.25)
    progress = dev.taken(run, run.start)

    def kept():
        return sorted(path.name for path in (tmp_path / "best").glob("*.safetensors"))

    for steps in (2, 4):
        progress = dev.taken(run, after(progress, steps))
        assert kept() == ["step-2.safetensors"]  # that of no step may be asked for
    run.checkpoints.save(progress)
    for steps in (6, 8):
        progress = dev.taken(run, after(progress, steps))
        assert kept() == ["step-2.safetensors", "step-6.safetensors"]
    assert run.checkpoints.load(run.checkpoints.named(4), run.start.state).dev == progress.dev[:3]
    chosen = dev.chosen(run, progress.state, progress.dev)
    assert chosen.lower_params["w"].tolist() == [6.0]
    assert progress.state.lower_params["w"].tolist() == [8.0]
    assert [line["best_of_n"] for line in logged(tmp_path, "dev")] == [0.25, 0.5, 0.5, 0.75, 0.25]


def test_a_damaged_best_step_is_refused(tmp_path):
    run, dev = toy_run(tmp_path), toy_evaluation(0.5)
    progress = dev.taken(run, run.start)
    file = tmp_path / "best" / "step-0.safetensors"
    bits = bytearray(file.read_bytes())
    bits[-1] ^= 1
    file.write_bytes(bits)
    with pytest.raises(DataError, match="SHA-256"):
        dev.chosen(run, progress.state, progress.dev)


def test_scores_of_another_dev_file_and_a_lost_best_step_are_refused(tmp_path):
    other = toy_run(tmp_path, (DevScore(2, 0.5, "other"),))
    with pytest.raises(OptionError, match=r"--dev-file .*another than when it was scored after"):
        toy_evaluation().check(other)
    lost = toy_run(tmp_path, (DevScore(2, 0.5, "digest"),))
    with pytest.raises(OptionError, match=r"--keep-best: .*step-2.safetensors is not there"):
        toy_evaluation().check(lost)
    toy_evaluation(keeps_best=False).check(lost)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"dev_file": None}, "--eval-every 2 has no effect with --dev-file none"),
        ({"eval_every": 0, "keep_best": True}, "--keep-best has no effect with --eval-every 0"),
        (
            {"keep_best": True, "sharding": "full", "weighting": "none", "batch_size": 1},
            "--sharding full --keep-best: not shown to be right over shards",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(task, tmp_path, more, text):
    with pytest.raises(OptionError, match=text):
        run_training(short(task, tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()


def test_a_dev_set_that_cannot_choose_is_refused(task, tmp_path):
    alike = altered(
        task.data / "dev.jsonl", tmp_path / "dev.jsonl", lambda _, row: row | {"correct": False}
    )
    with pytest.raises(
        OptionError, match=r"--keep-best: of .* none has right and wrong candidates"
    ):
        run_training(short(task, tmp_path / "run", keep_best=True, dev_file=str(alike)))
    assert not (tmp_path / "run").exists()


def test_a_model_is_not_chosen_on_the_test_set(task, tmp_path):
    more = {"keep_best": True, "test_file": str(task.data / "dev.jsonl")}
    with pytest.raises(
        OptionError, match=r"--keep-best: --dev-file .*dev.jsonl is the same file with --test-file"
    ):
        run_training(short(task, tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()
    check_together(
        short(task, tmp_path / "run", **more, weighting="none", meta_file=None, sanity_check=True)
    )


def test_adapters_alone_are_kept(task, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    sizes = {}
    write = recipes.train.dev_evaluation.write_tensors

    def written(path, tensors):
        sizes[path.name] = sum(tensor.numel() for tensor in tensors.values())
        return write(path, tensors)

    monkeypatch.setattr(recipes.train.dev_evaluation, "write_tensors", written)
    with_accuracies(monkeypatch, 0.25, 0.75, 0.5, 0.5)
    more = {"weighting": "none", "lora_rank": 2, "keep_best": True}
    run = run_training(short(task, tmp_path / "run", **more))
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert set(sizes.values()) == {sum(value.numel() for value in adapter.values())}
    last = load_file(run / "last" / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(value, last[name]) for name, value in adapter.items())


def test_a_line_tells_step_accuracy_best_and_the_time_left(task, tmp_path, monkeypatch, capsys):
    with_accuracies(monkeypatch, 0.25, 0.75, 0.5, 0.5)
    run = run_training(
        short(task, tmp_path / "run", weighting="none", eval_every=2, log_every=3, progress=True)
    )
    assert [(line["phase"], line["step"]) for line in read_lines(run / "log.jsonl")] == [
        *(("dev", 0), ("dev", 2), ("no_selection", 3), ("dev", 4), ("no_selection", 6), ("dev", 6)),
    ]
    lines = [line for line in capsys.readouterr().err.splitlines() if "dev best-of-N" in line]
    assert len(lines) == 4
    assert lines[0] == "no_selection, step 0 of 6: dev best-of-N 0.2500"
    told = "no_selection, step 4 of 6: dev best-of-N 0.5000 (best so far 0.7500, step 2), "
    assert lines[2].startswith(told)
    assert lines[2].endswith(" left")


def test_when_an_evaluation_is_due():
    dev = DevEvaluation(10, 25, False, "", "", "", False, lambda params: None)

    def scores(*steps):
        return [DevScore(step, 0.5, "") for step in steps]

    assert dev.due(0, [])
    assert dev.due(3, [])  # a run that was begun without
    assert not dev.due(9, scores(0))
    assert dev.due(12, scores(0))  # a window of several steps passed 10
    assert not dev.due(19, scores(0, 12))
    assert dev.due(20, scores(0, 12))
    assert dev.due(25, scores(0, 12, 20))  # the last
    assert not dev.due(25, scores(0, 12, 20, 25))


def test_the_best_is_the_earliest_of_the_highest():
    scores = [DevScore(step, value, "") for step, value in ((0, 0.1), (5, 0.3), (9, 0.3))]
    assert best_of(scores) == scores[1]
