"""``--report-to``: trackers get what the log says, once, and never end a run."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bilevel import BilevelSolver
from recipes.__main__ import main
from recipes.options.parse import changed, train_options
from recipes.run.errors import RunError
from recipes.train.cold_start import run_cold_start
from recipes.train.trackers import STATE, Tracking, check_trackers, points
from recipes.train.training import run_training
from tests.recipes.train.tracker_packages import INIT, KINDS, Histogram, Run, stand_in
from tests.tiny_task import model_bits, read_lines

WHY = "the extra `tensorboard` is not installed"


def numbers_of(log: list[dict]) -> list[tuple[int, dict[str, float]]]:
    """The points of a log, spelled out anew for the names that these runs have."""
    found = []
    for line in log:
        group = "dev" if line["phase"] == "dev" else "train"
        named = {
            name
            if name.split("/")[0] in ("weights", "hypergradient", "meta") and "/" in name
            else f"{group}/{name}": value
            for name, value in line.items()
            if name not in ("phase", "step", "notes") and value is not None
        }
        found.append((line["step"], named))
    return found


def scalars(run: Run) -> list[tuple[int, dict[str, float]]]:
    rows = [(s, {k: v for k, v in r.items() if type(v) is float}) for s, r in run.rows]
    return [row for row in rows if row[1]]


def histograms(runs: list[Run], name: str) -> dict[int, list]:
    found: dict[int, list] = {}
    for run in runs:
        for step, row in run.rows:
            if name in row:
                found.setdefault(step, []).append(row[name])
    return found


@pytest.fixture(scope="module")
def followed(task, tmp_path_factory):
    """A run that is stopped in its fourth step and goes on from its second, with every tracker.

    Returns its folder, the runs of the stand-ins, and that of an undisturbed run without trackers.
    """
    folder = tmp_path_factory.mktemp("followed")
    try:
        import tensorboard  # noqa: F401

        names = ("tensorboard", "trackio", "wandb")
    except ModuleNotFoundError:
        names = ("trackio", "wandb")
    more = {"dev_file": str(task.data / "dev.jsonl"), "eval_every": 2, "save_every": 2}
    more |= {"test_file": None, "initial_loss": False}
    options = task.train(folder / "run", steps=5, report_to=names, **more)
    advance = BilevelSolver.advance

    def fails(self, state, *rest):
        if int(state.lower_steps) == 3:
            raise ValueError("killed")
        return advance(self, state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        opened = {name: stand_in(patch, name) for name in ("wandb", "trackio")}
        patch.setattr(BilevelSolver, "advance", fails)
        with pytest.raises(RunError, match="killed"):
            run_training(options)
        patch.setattr(BilevelSolver, "advance", advance)
        resume = str(folder / "run" / "checkpoints" / "step-2")
        own = changed(options, resume=resume, output_dir=str(folder / "run"))
        run_training(own)
    plain = run_training(changed(options, report_to=(), output_dir=str(folder / "plain")))
    return folder / "run", opened, plain


def test_the_run_is_the_one_without_trackers(followed):
    run, _, plain = followed
    assert model_bits(run) == model_bits(plain)
    assert (run / "log.jsonl").read_bytes() == (plain / "log.jsonl").read_bytes()
    assert not (plain / STATE).exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_has_every_line_of_the_log_once(followed, name):
    run, opened, _ = followed
    log = read_lines(run / "log.jsonl")
    first, second = opened[name]
    assert [row for one in opened[name] for row in scalars(one)] == numbers_of(log)
    assert {step for step, _ in scalars(first)} == {0, 1, 2, 3}  # Step 3 came again, unsent.
    assert {step for step, _ in scalars(second)} == {4, 5}
    assert first.given["resume"] == second.given["resume"] == "allow"
    assert first.given["project"] == "bilevel-prm"
    assert first.given["config"]["steps"] == 5
    known = json.loads((run / STATE).read_text())[name]["id"]
    if name == "wandb":
        assert first.given["id"] == second.given["id"] == known
        assert first.metrics == {"train/global_step": None, "*": "train/global_step"}
        assert (first.ended, second.ended) == (1, 0)
    else:
        assert first.given["name"] == second.given["name"] == f"run-{known}"
        assert first.ended == second.ended == "finished"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_weights_become_histograms(followed, name):
    run, opened, _ = followed
    steps = [line["step"] for line in read_lines(run / "log.jsonl") if "weights/mean" in line]
    batches = histograms(opened[name], "weights/batch")
    assert {step: len(all_) for step, all_ in batches.items()} == dict.fromkeys(steps, 1)
    assert all(each.np_histogram[0].sum() == 6 for (each,) in batches.values())
    weights = np.array([line["weight"] for line in read_lines(run / "weights.jsonl")])
    (last,) = histograms(opened[name], "weights/all")[5]
    counts, edges = last.np_histogram
    assert counts.sum() == len(weights)
    assert (edges[0], edges[-1]) == pytest.approx((weights.min(), weights.max()), abs=1e-6)


def test_tensorboard_reads_back_what_the_log_says(followed):
    pytest.importorskip("tensorboard", reason=WHY)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _, _ = followed
    all_of_them = {"scalars": 0, "histograms": 0}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance=all_of_them).Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for step, values in numbers_of(read_lines(run / "log.jsonl")):
        for name, value in values.items():
            expected.setdefault(name, []).append((step, float(np.float32(value))))
    found = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert found == expected
    assert len(list((run / "tensorboard").iterdir())) == 2  # each part of the run wrote its own
    weighted = [line for line in read_lines(run / "log.jsonl") if "weights/mean" in line]
    batches = events.Histograms("weights/batch")
    assert [event.step for event in batches] == [line["step"] for line in weighted]
    for event, line in zip(batches, weighted, strict=True):
        assert event.histogram_value.num == 6
        assert event.histogram_value.sum == pytest.approx(6 * line["weights/mean"], rel=1e-5)
        assert event.histogram_value.max == pytest.approx(line["weights/max"], rel=1e-6)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_stand_ins_have_the_real_signatures(name):
    module = pytest.importorskip(name, reason=f"the extra `{name}` is not installed")
    assert tuple(inspect.signature(module.init).parameters) == INIT[name]
    if name == "wandb":
        from wandb.sdk.wandb_run import Run as Real
    else:
        from trackio.run import Run as Real
    methods = ("log", "finish", "define_metric")[: 3 if name == "wandb" else 2]
    for method in methods:
        assert [*inspect.signature(getattr(KINDS[name], method)).parameters] == [
            *inspect.signature(getattr(Real, method)).parameters
        ]
    assert [*inspect.signature(module.Histogram).parameters] == [
        *inspect.signature(Histogram).parameters
    ]


def line(step: int, phase: str = "net", **values) -> str:
    return json.dumps({"phase": phase, "step": step, **values}) + "\n"


def test_points_of_a_line():
    entry = {"phase": "net", "step": 3, "lower_loss": 0.5, "upper_loss": None, "meta/score": 1}
    entry |= {"troubles": {"lower_loss": 2}, "skipped_steps": [3], "notes": ["cold"]}
    assert points(entry) == {"train/lower_loss": 0.5, "meta/score": 1.0, "troubles/lower_loss": 2.0}
    assert points({"phase": "dev", "step": 3, "best_of_n": 0.25}) == {"dev/best_of_n": 0.25}


def test_a_tracker_that_fails_is_warned_of_once_and_the_others_go_on(tmp_path, capsys):
    gone, well = KINDS["trackio"]({}, fails_from=2), KINDS["trackio"]({})
    log = tmp_path / "log.jsonl"
    tracking = Tracking(
        tmp_path,
        {"wandb": _sent_to(gone), "trackio": _sent_to(well)},
        {name: {"id": "x", "sent": {}} for name in ("wandb", "trackio")},
    )
    for step in (1, 2, 3):
        with log.open("a") as file:
            file.write(line(step, lower_loss=step / 2))
        tracking.follow(step, torch.ones(4))
    tracking.close(failed=False)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: --report-to wandb: ConnectionError: the server is gone; the run goes on without "
        "it. A resumed run sends what is missing"
    ]
    assert [step for step, _ in gone.rows] == [1, 1]  # the line, and its histogram
    assert [row for row in well.rows if "train/lower_loss" in row[1]] == [
        (step, {"train/lower_loss": step / 2}) for step in (1, 2, 3)
    ]
    state = json.loads((tmp_path / STATE).read_text())
    assert (state["wandb"]["sent"]["train"], state["trackio"]["sent"]["train"]) == (1, 3)
    later = Tracking(tmp_path, {"wandb": _sent_to(well)}, state)
    later.follow(3)
    assert well.rows[-2:] == [(step, {"train/lower_loss": step / 2}) for step in (2, 3)]


def _sent_to(run: Run):
    class One:
        def send(self, step, values):
            run.note(step, dict(values))

        def close(self, failed):
            run.ended = failed

    return One()


def test_what_cannot_be_a_point_is_left_out(tmp_path):
    run = KINDS["trackio"]({})
    tracking = Tracking(tmp_path, {"trackio": _sent_to(run)}, {"trackio": {"sent": {}}})
    tracking.follow(1, torch.tensor([1.0, float("nan")]))  # no line yet, no finite weights
    (tmp_path / "log.jsonl").write_text(line(1, lower_loss=1.0) + '{"phase": "net", "st')
    tracking.follow(1)
    assert run.rows == [(1, {"train/lower_loss": 1.0})]


def test_a_cold_start_is_followed_too(task, tmp_path, monkeypatch):
    opened = stand_in(monkeypatch, "wandb")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run = run_cold_start(task.cold_start(tmp_path / "cold", report_to=("wandb",)))
    (only,) = opened
    assert scalars(only) == numbers_of(read_lines(run / "log.jsonl"))
    assert (len(only.rows), only.given["project"], only.given["name"]) == (3, "mine", "cold")
    assert only.ended == 0


def test_a_missing_extra_is_refused_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ["train", "--train-file", str(Path(__file__)), "--output-dir", str(tmp_path / "run")]
    words += ["--weighting", "none", "--report-to", "wandb"]
    assert main(words) == 1
    assert capsys.readouterr().err.splitlines() == [
        "bilevel-prm train: --report-to wandb: wandb is not installed: "
        "pip install 'bilevel-prm[wandb]'"
    ]
    assert not (tmp_path / "run").exists()


def test_names_of_trackers_are_checked(monkeypatch, capsys):
    stand_in(monkeypatch, "wandb")
    with pytest.raises(ValueError, match="--report-to wandb wandb: a tracker is named twice"):
        check_trackers(("wandb", "wandb"))
    assert main(["train", "--report-to", "wandbb"]) == 2
    assert "expected one of tensorboard, trackio, wandb; found 'wandbb'" in capsys.readouterr().err
    given = {"train_file": "t", "output_dir": "o", "weighting": "none"}
    assert train_options(**given).run.report_to == ()


def test_a_tracker_that_cannot_be_started_ends_the_run_before_its_first_step(
    task, tmp_path, monkeypatch
):
    stand_in(monkeypatch, "trackio")

    def init(**given):
        raise PermissionError("not logged in")

    monkeypatch.setattr(sys.modules["trackio"], "init", init)
    options = task.cold_start(tmp_path / "cold", report_to=("trackio",))
    said = r"--report-to trackio: cannot be started \(PermissionError: not logged in\). Go on with"
    with pytest.raises(RunError, match=said) as raised:
        run_cold_start(options)
    assert not (tmp_path / "cold" / "log.jsonl").exists()
    words = str(raised.value).partition("without trackers: bilevel-prm ")[2].split()
    assert main([*words, "--no-progress"]) == 0
    assert len(read_lines(tmp_path / "cold" / "log.jsonl")) == 3
