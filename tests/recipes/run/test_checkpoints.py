"""A run that was interrupted goes on as if it had not been, to the last bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import prm.files
from bilevel import BilevelSolver, tree
from bilevel.autodiff.random_state import capture
from recipes.__main__ import main
from recipes.options.parse import changed, resolve, train_options
from recipes.options.train import TrainOptions
from recipes.options.values import OptionError
from recipes.run.checkpoints import Checkpoints, Progress
from recipes.run.identity import differences, identity
from recipes.run.resume import Run, cut_log
from recipes.run.step_log import Unlogged
from recipes.run.trouble import Seen
from recipes.train.cold_start import run_cold_start
from recipes.train.loop import StepLogging, Training, train
from recipes.train.training import run_training
from tests.recipes.run.toy_problem import TOY, toy
from tests.tiny_task import altered, model_bits, read_lines

KINDS = {
    "net": {"weighting": "net", "loss_target": "pairs", "order": "lower-first"},
    "table": {"weighting": "table", "bound": "clip", "upper_optimizer": "lazy-adam"},
    "table, windows": {
        "weighting": "table",
        "bound": "clip",
        "normalise": "table",
        "unroll_steps": 2,
        "rollback": True,
        "batch_size": 3,
        "accumulation": 2,
    },
    "domain": {"weighting": "domain", "bound": "softplus"},
    "none": {"weighting": "none"},
    "meta": {"weighting": "none", "lower_data": "meta"},
}
WRITTEN = ("log.jsonl", "weights.jsonl", "test_questions.jsonl")


@pytest.fixture
def interrupt(monkeypatch):
    """``interrupt(n)``: the n-th lower step from now on is never taken."""
    original = BilevelSolver.advance

    def at(number):
        calls = iter(range(1, number + 1))

        def step(*args, **more):
            if next(calls, number) == number:
                raise KeyboardInterrupt
            return original(*args, **more)

        monkeypatch.setattr(BilevelSolver, "advance", step)

    yield at
    monkeypatch.undo()


def resumed(run, **more):
    return run_training(resolve(TrainOptions, {"resume": str(run), **more}))


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_is_the_uninterrupted_one(
    task, tmp_path, interrupt, monkeypatch, kind, capsys
):
    options = task.train(tmp_path / "whole", steps=7, log_every=3, save_every=2, **KINDS[kind])
    whole = run_training(options)
    run = tmp_path / "run"
    interrupt(4)
    with pytest.raises(KeyboardInterrupt):
        run_training(replace(options, output_dir=str(run)))
    # What a killed process leaves behind: a log that is ahead, cut short in its last line.
    with (run / "log.jsonl").open("a") as log:
        log.write('{"phase": "ahead", "step": 4}\n{"phase": "cut sho')
    interrupt(3)  # two more from step 2, so the next checkpoint is written
    with pytest.raises(KeyboardInterrupt):
        resumed(run)
    assert "resumed after 2 of 7 lower steps" in capsys.readouterr().out
    assert (run / "checkpoints" / "step-4").is_dir()
    monkeypatch.undo()
    shutil.move(run, tmp_path / "moved")
    run = resumed(tmp_path / "moved")
    assert "resumed after 4 of 7 lower steps" in capsys.readouterr().out
    assert model_bits(run) == model_bits(whole)
    for name in WRITTEN:
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    if "weighting" in {path.name for path in whole.iterdir()}:
        params = "weighting/params.safetensors"
        assert (run / params).read_bytes() == (whole / params).read_bytes()
    assert resolve(TrainOptions, {"config": str(run / "args.yaml")}) == replace(
        options, output_dir=str(run), context="plus", max_patches=6
    )


def test_saving_changes_nothing(task, tmp_path):
    plain = run_training(task.train(tmp_path / "plain", steps=5))
    assert not (plain / "checkpoints").exists()
    saved = run_training(task.train(tmp_path / "saved", steps=5, save_every=1))
    assert model_bits(saved) == model_bits(plain)
    for name in WRITTEN:
        assert (saved / name).read_bytes() == (plain / name).read_bytes()
    kept = {path.name for path in (saved / "checkpoints").iterdir()}
    assert kept == {"step-4", "step-5"}


def test_cold_start_is_resumed_too(task, tmp_path, interrupt, monkeypatch):
    options = task.cold_start(tmp_path / "whole", steps=5, save_every=2)
    whole = run_cold_start(options)
    interrupt(4)
    with pytest.raises(KeyboardInterrupt):
        run_cold_start(replace(options, output_dir=str(tmp_path / "run")))
    monkeypatch.undo()
    assert main(["cold-start", "--resume", str(tmp_path / "run")]) == 0
    assert model_bits(tmp_path / "run") == model_bits(whole)
    assert (tmp_path / "run/log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


@pytest.fixture(scope="module")
def stopped(task, tmp_path_factory):
    """A run that holds checkpoints and no results."""
    run = run_training(
        task.train(tmp_path_factory.mktemp("stopped") / "run", steps=2, save_every=1)
    )
    (run / "results.json").unlink()
    return run


@pytest.fixture
def refused(capsys):
    """What the command says when it refuses to resume."""

    def command(run, *words: str) -> str:
        assert main(["train", "--resume", str(run), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        return line.removeprefix("bilevel-prm train: ")

    return command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lower-lr 0.5", "--lower-lr 0.5 (checkpoint: 0.002). Give the run's own options"),
        ("--steps 9 --seed 3", "--seed 3 (checkpoint: 0); --steps 9 (checkpoint: 2). Give"),
        ("--hidden 3", "--hidden 3 (checkpoint: 10)"),
        ("--weighting table", "--weighting table (checkpoint: net)"),
        ("--context gold", "--context gold (checkpoint: plus)"),
        ("--freeze", "--freeze [] (checkpoint: ['vision_tower'])"),
        ("--model embedded", "--model, --init-from (checkpoint: other initial parameters)"),
        ("--train-file {other}", "--train-file (checkpoint: a file of other content)"),
        ("--meta-file {other}", "--meta-file (checkpoint: a file of other content)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(
    task, stopped, refused, tmp_path, words, message
):
    source = "meta.jsonl" if "meta" in words else "train.jsonl"
    other = altered(task.data / source, tmp_path / source, lambda _, row: row | {"remark": 1})
    said = refused(stopped, *words.format(other=other).split())
    assert said.startswith(f"--resume: {stopped}/checkpoints/step-2 is of another run: ")
    assert message in said


def test_what_decides_nothing_may_change_and_files_may_move(task, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    data = shutil.copytree(task.data, tmp_path / "data")
    words = ["--train-file", str(data / "train.jsonl"), "--meta-file", str(data / "meta.jsonl")]
    words += ["--save-every", "5", "--log-every", "7", "--test-file", "none"]
    assert main(["train", "--resume", str(run), *words]) == 0
    options = resolve(TrainOptions, {"config": str(run / "args.yaml")})
    assert (options.run.save_every, options.data.test_file, options.run.resume) == (5, None, None)
    assert options.output_dir == str(run)


def test_what_cannot_be_resumed_says_why(task, stopped, refused, tmp_path):
    assert refused(tmp_path) == (
        f"--resume {tmp_path}: expected the directory of a run, found no {tmp_path}/args.yaml"
    )
    assert refused(stopped, "--config", "train-net") == (
        "--resume takes the options from the run's args.yaml; leave out --config"
    )
    assert refused(stopped, "--output-dir", "elsewhere") == (
        f"--resume {stopped} --output-dir elsewhere: a resumed run stays in its directory: leave "
        "out --output-dir"
    )
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "checkpoints/step-2/state.safetensors").write_bytes(b"cut short")
    assert f"{run}/checkpoints/step-2 cannot be read" in refused(run)
    shutil.rmtree(run / "checkpoints/step-2")
    shutil.move(run / "checkpoints/step-1", run / "checkpoints/step-1.tmp")
    assert refused(run / "checkpoints" / "step-7") == (
        f"--resume {run}/checkpoints/step-7: no complete checkpoint (there are: none)"
    )
    (run / "results.json").write_text("{}")
    assert refused(run) == f"--resume {run}: the run is complete, it has its results.json"


def test_a_checkpoint_is_tensors_and_json(stopped):
    path = stopped / "checkpoints" / "step-2"
    assert {file.name for file in path.iterdir()} == {"state.safetensors", "run.json"}
    run = json.loads((path / "run.json").read_text())
    assert run["step"] == 2
    assert set(run["identity"]) == {"options", "files", "pictures", "model"}
    assert (run["due"], run["seen"]["counts"]) == (True, {})
    tensors = load_file(path / "state.safetensors")
    assert {name.partition("/")[0] for name in tensors} == {"state", "random"}
    assert int(tensors["state/lower_steps"]) == 2


def toy_batches(step):
    rows = torch.arange(3 * step, 3 * step + 3) % 8
    return [{"x": rows.double() / 4, "row": rows}]


def toy_run(solver, start, steps, checkpoints):
    run = Run("bilevel-prm toy", checkpoints.directory.parent, checkpoints, start, start)
    run.directory.mkdir(exist_ok=True)
    training = Training(
        solver,
        steps=steps,
        lower_batches=toy_batches,
        title="toy",
        on_trouble="raise",
        upper_batch=lambda step: {},
    )
    return train(run, training, StepLogging(4)).state


def newest(checkpoints, example):
    return checkpoints.load(checkpoints.newest(), example)


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_every_part_of_the_state_is_needed_and_there(tmp_path, at):
    """Random numbers, moments, counts and the average of v, from any step."""
    saving = Checkpoints(tmp_path / "checkpoints", every=at, keep=0, identity=TOY)
    never = replace(saving, every=0)
    solver, state = toy()
    start = Progress(state, capture(state.lower_params))
    whole = toy_run(solver, start, 9, never)
    toy_run(solver, start, at, saving)
    torch.manual_seed(99)
    ended = toy_run(solver, newest(saving, toy()[1]), 9, never)
    for (name, one), other in zip(
        tree.flatten(whole).items(), tree.flatten(ended).values(), strict=True
    ):
        assert torch.equal(one, other), name
        assert one.dtype == other.dtype, name


def test_figures_not_yet_logged_are_kept(tmp_path):
    solver, state = toy()
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=3, keep=0, identity=TOY)
    start = Progress(state, capture(state.lower_params))
    toy_run(solver, start, 9, checkpoints)
    whole = (tmp_path / "log.jsonl").read_text()
    middle = newest(checkpoints, state)
    assert (int(middle.state.lower_steps), middle.unlogged) == (9, Unlogged({}))
    shutil.rmtree(tmp_path / "checkpoints" / "step-9")
    middle = newest(checkpoints, state)
    figures = ("lower_loss", "lower_grad_norm", "upper_loss", "hypergradient_norm")
    kept = middle.unlogged.figures
    assert {name: len(values) for name, values in kept.items()} == dict.fromkeys(figures, 2)
    cut_log(tmp_path / "log.jsonl", 6)
    toy_run(solver, middle, 9, replace(checkpoints, every=0))
    assert (tmp_path / "log.jsonl").read_text() == whole


def test_what_is_read_is_what_was_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=0, identity=TOY)
    solver, state = toy()
    state = toy_run(solver, Progress(state, capture(())), 5, replace(checkpoints, every=0))
    figures = {"weights/mean": [1.0, float("inf"), 0.1 + 0.2], "lower_loss": [1e-300]}
    unlogged = Unlogged(figures, ["α"], {"hypergradient_vanished": 2}, [3])
    seen = Seen({"hypergradient_vanished": 4}, [0.1 + 0.2], 1)
    written = Progress(state, capture(state.lower_params), unlogged, seen)
    assert checkpoints.save(written) == tmp_path / "checkpoints" / "step-5"
    read = newest(checkpoints, toy()[1])
    assert (read.unlogged, read.seen) == (unlogged, seen)
    assert torch.equal(read.random.cpu, written.random.cpu)
    named, again = tree.flatten(state), tree.flatten(read.state)
    assert list(named) == list(again)
    assert all(torch.equal(value, again[name]) for name, value in named.items())


@pytest.mark.parametrize("skipped", [0, 3])
def test_a_count_that_version_0_1_has_not_is_0(tmp_path, skipped):
    """It is written once it is not 0, so that files without one stay as they were."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=0, identity=TOY)
    _, state = toy()
    state = state._replace(lower_skipped=torch.full_like(state.lower_skipped, skipped))
    path = checkpoints.save(Progress(state, capture(())))
    assert ("state/lower_skipped" in load_file(path / "state.safetensors")) == (skipped > 0)
    read = newest(checkpoints, toy()[1]).state.lower_skipped
    assert (int(read), read.dtype) == (skipped, torch.int64)


def test_oldest_are_removed_and_the_newest_counts(tmp_path):
    _, state = toy()
    for keep, expected in ((2, {"step-9", "step-10"}), (0, {"step-9", "step-10", "step-8"})):
        checkpoints = Checkpoints(tmp_path / str(keep), every=1, keep=keep, identity=TOY)
        for steps in (8, 9, 10):
            at = state._replace(lower_steps=torch.tensor(steps))
            checkpoints.save(Progress(at, capture(())))
        assert {path.name for path in checkpoints.directory.iterdir()} == expected
        assert checkpoints.newest().name == "step-10"  # not "step-9", the last by its name


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path, monkeypatch):
    _, state = toy()
    checkpoints = Checkpoints(tmp_path, every=1, keep=1, identity=TOY)
    checkpoints.save(Progress(state, capture(())))
    killed = shutil.copytree(tmp_path / "step-0", tmp_path / ".step-2.x7yz.unfinished")

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(prm.files, "flush", interrupted)
    later = Progress(state._replace(lower_steps=torch.tensor(1)), capture(()))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(later)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"step-0"}
    assert checkpoints.newest().name == "step-0"
    killed.mkdir()
    checkpoints.save(later)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1"}


def test_when_a_checkpoint_is_due(tmp_path):
    due = Checkpoints(tmp_path, every=3, keep=0, identity=TOY).due
    assert [steps for steps in range(1, 10) if due(steps - 1, steps)] == [3, 6, 9]
    assert not any(Checkpoints(tmp_path, 0, 0, TOY).due(steps, steps + 1) for steps in range(9))
    # Windows of two, from step 1: inside the first falls 3, at the end of the third 6.
    assert [end for end in (3, 5, 7, 9) if due(end - 2, end)] == [3, 7, 9]


def test_a_checkpoint_that_was_due_is_kept_for_rollback(tmp_path):
    _, state = toy()
    checkpoints = Checkpoints(tmp_path, every=5, keep=1, identity=TOY)
    for steps, due in ((5, True), (6, False), (7, False)):
        at = state._replace(lower_steps=torch.tensor(steps))
        checkpoints.save(Progress(at, capture(())), due=due)
    assert {path.name for path in tmp_path.iterdir()} == {"step-5", "step-7"}
    assert (checkpoints.newest().name, checkpoints.newest_due().name) == ("step-7", "step-5")


def test_a_state_of_another_shape_is_named(tmp_path):
    _, state = toy()
    checkpoints = Checkpoints(tmp_path, every=1, keep=0, identity=TOY)
    checkpoints.save(Progress(state, capture(())))
    wider = state._replace(upper_params={"raw": torch.zeros(9, dtype=torch.float64)})
    with pytest.raises(OptionError, match=r"step-0: upper_params/raw: expected .*\(9,\), found"):
        newest(checkpoints, wider)


def test_identity_is_that_of_contents(tmp_path):
    options = train_options(
        train_file=str(tmp_path / "a"),
        output_dir="o",
        weighting="none",
        lower_data="meta",
        meta_file=str(tmp_path / "a"),
    )
    for name in ("a", "b"):
        (tmp_path / name).write_text("same")
    model = torch.nn.Linear(2, 2)
    one = identity(options, model)
    moved = replace(options, train_file=str(tmp_path / "b"), output_dir="p", threads=3)
    assert differences(one, identity(moved, model)) == []
    (tmp_path / "b").write_text("other")
    assert differences(one, identity(moved, model)) == [
        "--train-file (checkpoint: a file of other content)"
    ]
    assert differences(one, identity(changed(options, meta_file=str(tmp_path / "b")), model)) == [
        "--meta-file (checkpoint: a file of other content)"
    ]
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert differences(one, identity(options, model)) == [
        "--model, --init-from (checkpoint: other initial parameters)"
    ]
    older = {**one, "options": {k: v for k, v in one["options"].items() if k != "seed"}}
    assert differences(older, one) == ["--seed 0 (checkpoint: None)"]


def test_log_is_cut_after_the_step_and_at_a_broken_line(tmp_path):
    log = tmp_path / "log.jsonl"
    cut_log(log, 3)
    assert not log.exists()
    log.write_text('{"step": 2, "x": 0.10}\n{"step": 4}\n{"step": 6}\n')
    cut_log(log, 5)
    assert log.read_text() == '{"step": 2, "x": 0.10}\n{"step": 4}\n'
    log.write_text('{"step": 2}\n{"st')
    cut_log(log, 5)
    assert log.read_text() == '{"step": 2}\n'
    assert read_lines(log) == [{"step": 2}]


def test_an_option_newer_than_a_run_had_its_default(tmp_path):
    (tmp_path / "a").write_text("same")
    options = train_options(train_file=str(tmp_path / "a"), output_dir="o", weighting="none")
    now = identity(options, torch.nn.Linear(2, 2))
    then = now | {"options": {k: v for k, v in now["options"].items() if k != "tokens_per_batch"}}
    assert differences(then, now) == []
    now["options"]["tokens_per_batch"] = 7
    assert differences(then, now) == ["--tokens-per-batch 7 (checkpoint: 65536)"]
