"""Commands over ranks: the run of one process, whatever the number, and faults of a rank."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bilevel import Alone
from bilevel.replicas import _is_known
from recipes.__main__ import main
from recipes.ranks import (
    lost,
    one_gpu_each,
    over_ranks,
    ranks_here,
    share,
)
from recipes.train.batches import meta_batch, per_step
from tests.rank_processes import fork_ranks, run_ranks, torchrun
from tests.recipes.rank_commands import free_port
from tests.tiny_task import FORWARD_MODE, SYSTEM_PROMPT, read_lines

RANKS = "tests.recipes.rank_commands"
STEPS = 6


def flags(**options) -> list[str]:
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def training(task, output: Path, evaluated: bool = True, **more) -> list[str]:
    """A run of three micro-batches a step: two ranks take one and two, and so their meta batch."""
    test = {"test_file": task.data / "test.jsonl"} if evaluated else {}
    options = {
        "model": task.model,
        "system_prompt": SYSTEM_PROMPT,
        "train_file": task.data / "train.jsonl",
        "meta_file": task.data / "meta.jsonl",
        **test,
        "steps": STEPS,
        "batch_size": 3,
        "accumulation": 3,
        "meta_batch_size": 5,
        "upper_start": 1,
        "upper_optimizer": "sgd",  # Adam amplifies the rounding of small gradients
        "upper_lr": 0.1,
        "lower_warmup": 0.0,
        "freeze": "vision_tower",
        "log_every": 1,
        "save_every": 2,
        "keep_checkpoints": 0,
        "output_dir": output,
    }
    return ["train", *flags(**options | more)]


def use(task, folder: Path, run: Path) -> list[list[str]]:
    """Score, evaluate and weigh with the model and the weighting of a run."""
    common = {"model": run / "model", "system_prompt": SYSTEM_PROMPT, "eval_batch_size": 3}
    test = task.data / "test.jsonl"
    weigh = {"file": task.data / "train.jsonl", "weighting": run / "weighting"}
    return [
        ["score", *flags(**common, file=test, output=folder / "scores.jsonl")],
        ["evaluate", *flags(**common, file=test, output=folder / "evaluation.json")],
        ["weigh", *flags(**common, **weigh, output=folder / "weights.jsonl")],
    ]


VARIANTS: dict[str, dict] = {
    "table": {"weighting": "table", "normalise": "table", "upper_optimizer": "lazy-adam"},
    "domain": {"weighting": "domain"},
    "pairs": {"loss_target": "pairs", "meta_batch_size": 8},
    "window": {"hypergradient": "unrolled", "unroll_steps": 2},
    "implicit": {"hypergradient": "implicit", "lower_weight_decay": 0, "solver_iterations": 3},
    "rollback": {"rollback": True},
    "kept": {"loss_target": "pairs", "meta_batch_size": 8, "frozen_activations": "memory"},
    "in place": {
        **{"execution": "resident", "order": "upper-first"},
        **{"eval_every": 2, "keep_best": True},
    },
}
"""Further runs, of the same length."""


def variant(task, folder: Path, name: str) -> list[str]:
    more = {"save_every": STEPS, **VARIANTS[name]}
    if "eval_every" in more:
        more["dev_file"] = task.data / "dev.jsonl"
    return training(task, folder / name, evaluated=False, **more)


def cold(task) -> dict:
    common = {"model": task.model, "system_prompt": SYSTEM_PROMPT, "freeze": "vision_tower"}
    sizes = {"steps": 3, "batch_size": 2, "accumulation": 3, "draw": 10, "save_every": 3}
    return common | sizes | {"train_file": task.data / "train.jsonl", "log_every": 1}


USED = ("scores.jsonl", "scores.jsonl.sha256", "evaluation.json", "weights.jsonl")


def interrupted(run: Path, copy: Path, steps: int) -> Path:
    """A copy of a complete run as if it had ended after so many steps."""
    shutil.copytree(run, copy)
    for path in (copy / "results.json", copy / "model", copy / "weighting"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > steps:
            shutil.rmtree(path)
    return copy


def ordered(folder: Path, *commands: list[str], **faults) -> Path:
    """Write the commands of ranks; a fault befalls the last, whose port may be torchrun's."""
    folder.mkdir()
    made = [{"arguments": list(map(str, words)), "port": free_port()} for words in commands]
    made[-1] |= faults
    (folder / "commands.json").write_text(json.dumps(made))
    return folder


def statuses(folder: Path, rank: int) -> list[int]:
    return json.loads((folder / f"statuses-{rank}.json").read_text())


@pytest.fixture(scope="module")
def ran(task, tmp_path_factory) -> Path:
    """All runs; ``one``, ``two`` and ``three`` are the same on so many processes."""
    folder = tmp_path_factory.mktemp("commands")
    assert main(training(task, folder / "one")) == 0
    ordered(folder / "of three", training(task, folder / "three"))
    kill = [3, 1, int(signal.SIGKILL)]
    ordered(folder / "of killed", training(task, folder / "killed"), fault=kill, port=None)
    fork_ranks(RANKS, folder / "of three", 3)
    status, output = torchrun(RANKS, 2, str(folder / "of killed"))
    seconds = time.time() - float((folder / "of killed" / "fault").read_text())
    (folder / "killed.json").write_text(json.dumps([status, output, seconds]))
    shutil.copytree(folder / "killed", folder / "after the kill")
    # The command itself, as docs/use.md says it; the variable is what accelerate launch writes.
    words = ("train", "--resume", str(folder / "killed"))
    status, output = torchrun("recipes", 2, *words, ACCELERATE_MIXED_PRECISION="no")
    assert status == 0, output
    assert output.count("run directory:") == 1
    for name, source in (("1 to 2", "one"), ("3 to 2", "three"), ("1 to 2 in place", "one")):
        interrupted(folder / source, folder / name, 4)
    (folder / "used").mkdir()
    ordered(
        folder / "of two",
        training(task, folder / "two"),
        *use(task, folder / "used", folder / "one"),
        ["train", "--resume", folder / "1 to 2"],
        ["train", "--resume", folder / "3 to 2"],
        ["train", "--resume", folder / "1 to 2 in place", "--execution", "resident"],
        *(variant(task, folder, name) for name in VARIANTS),
        ["cold-start", *flags(**cold(task), output_dir=folder / "cold")],
        training(task, folder / "few", accumulation=1),
        ["env"],
        training(task, folder / "stopped"),
        fault=[3, 1, int(signal.SIGTERM)],
    )
    outputs = run_ranks(RANKS, 2, folder / "of two")
    (folder / "outputs.json").write_text(json.dumps(outputs))
    return folder


@pytest.fixture(scope="module")
def outputs(ran) -> list[str]:
    """What each of the two ranks printed."""
    (first_status, first), (second_status, second) = json.loads((ran / "outputs.json").read_text())
    assert (first_status, second_status) == (0, 0), first + second
    return [first, second]


def state_of(run: Path, steps: int = STEPS) -> dict:
    return load_file(run / "checkpoints" / f"step-{steps}" / "state.safetensors")


def assert_close(run: Path, other: Path, tolerance: float, steps: int = STEPS) -> None:
    """Both levels of two runs, and their logs: float32, whose sums have another order."""
    one, two = state_of(run, steps), state_of(other, steps)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        if "_params/" in name:
            assert (two[name] - expected).norm() <= tolerance * (1 + expected.norm()), name
        elif name in ("state/lower_steps", "state/upper_steps") or name.startswith("random/"):
            assert (two[name] == expected).all(), name
    for line, same in zip(
        read_lines(run / "log.jsonl"), read_lines(other / "log.jsonl"), strict=True
    ):
        # Several ranks do not log scores of meta solutions: each knows those of its part.
        shared = line.keys() & same.keys()
        assert {name for name in line.keys() ^ same.keys() if not name.startswith("meta/")} == set()
        for name in shared:
            value = line[name]
            close = pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
            assert same[name] == close, name


def assert_same_bits(run: Path, other: Path) -> None:
    for name in (f"checkpoints/step-{STEPS}/state.safetensors", "model/model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert (run / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    assert (run / "weights.jsonl").read_text() == (other / "weights.jsonl").read_text()


@pytest.mark.parametrize("name", ["two", "three", "1 to 2", "3 to 2", "1 to 2 in place"])
def test_a_run_is_the_same_on_any_number_of_ranks(ran, outputs, name):
    """Two ranks share three micro-batches and five solutions; a run may change its ranks."""
    assert_close(ran / "one", ran / name, 2e-5)
    assert (
        json.loads((ran / name / "results.json").read_text())["rows"]
        == (json.loads((ran / "one" / "results.json").read_text())["rows"])
    )


@pytest.mark.parametrize("name", VARIANTS)
@FORWARD_MODE
@pytest.mark.filterwarnings("ignore::bilevel.StationarityWarning")
def test_other_runs_are_the_same_on_two_ranks(ran, outputs, task, tmp_path, name):
    assert main(list(map(str, variant(task, tmp_path, name)))) == 0
    assert_close(tmp_path / name, ran / name, 1e-4)


def test_a_cold_start_is_the_same_on_two_ranks(ran, outputs, task, tmp_path):
    options = flags(**cold(task), output_dir=tmp_path / "cold")
    assert main(["cold-start", *map(str, options)]) == 0
    assert_close(tmp_path / "cold", ran / "cold", 1e-5, 3)


def test_checkpoints_of_two_ranks_go_on_in_one_process(ran, outputs, tmp_path):
    copy = interrupted(ran / "two", tmp_path / "copy", 4)
    assert main(["train", "--resume", str(copy)]) == 0
    assert_close(ran / "two", copy, 2e-5)


@pytest.mark.parametrize("name", USED)
def test_what_is_scored_over_ranks_has_the_bits_and_order_of_one_process(ran, outputs, task, name):
    alone = ran / "used alone"
    if not alone.exists():
        alone.mkdir()
        for command in use(task, alone, ran / "one"):
            assert main(list(map(str, command))) == 0
    found = (ran / "used" / name).read_text()
    assert found.replace(str(ran / "used"), str(alone)) == (alone / name).read_text()


def test_a_killed_rank_ends_the_others_soon_and_says_how_to_go_on(ran):
    status, output, seconds = json.loads((ran / "killed.json").read_text())
    assert status != 0
    assert seconds < 60
    assert "bilevel-prm train: No Selection" not in output
    assert "another rank is gone or does not answer" in output
    there = ran / "after the kill"
    assert f"go on with: bilevel-prm train --resume {ran / 'killed'}" in output
    assert not (there / "lock").exists()
    assert not (there / "results.json").exists()


def test_a_run_of_which_a_rank_was_killed_resumes_under_torchrun_bit_for_bit(ran, outputs):
    """Beside ranks that the test has started one by one."""
    assert_same_bits(ran / "two", ran / "killed")


def test_a_signal_to_one_rank_stops_all_with_one_complete_checkpoint(ran, outputs):
    assert statuses(ran / "of two", 0)[-1] == statuses(ran / "of two", 1)[-1] == 143
    stopped = ran / "stopped"
    assert "train: instance_net: stopped by SIGTERM after 3 of 6 lower steps" in outputs[0]
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["step-2", "step-3"]
    assert len(read_lines(stopped / "log.jsonl")) == 3


def test_what_is_stopped_on_two_ranks_goes_on_in_one_process(ran, outputs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ran / "stopped", copy)
    assert main(["train", "--resume", str(copy)]) == 0
    assert_close(ran / "one", copy, 2e-5)


def test_rank_0_alone_prints(ran, outputs):
    first, second = outputs
    assert "run directory:" in first
    lines = [line for line in second.splitlines() if not line.startswith("## ")]
    assert [line for line in lines if "SIGTERM: stopping after this step" not in line] in ([], [""])


def test_too_few_micro_batches_and_commands_of_one_process_are_refused(ran, outputs):
    assert statuses(ran / "of two", 0) == [0] * 16 + [2, 2, 143]
    assert "--accumulation 1: 2 processes need a micro-batch each per lower step" in outputs[0]
    assert "bilevel-prm env: WORLD_SIZE=2: this command runs in one process" in outputs[0]
    assert not (ran / "few" / "args.yaml").exists()


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shares_in_their_order_are_the_whole(count, ranks):
    parts = [share(count, rank, ranks) for rank in range(ranks)]
    assert [at for part in parts for at in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_parts_of_a_step_and_of_a_meta_batch_are_those_of_one_process(task):
    questions = [[3], [1, 2], [0]]

    class Rows:
        def batch(self, rows):
            return {"rows": rows}

    whole = per_step(lambda number: number, 5)(7)
    assert [n for rank in range(3) for n in per_step(lambda number: number, 5, rank, 3)(7)] == whole
    parts = [meta_batch(lambda _: questions, Rows(), rank, 5)(0) for rank in range(5)]
    assert [part.get("rows") for part in parts] == [None, [3], None, [1, 2], [0]]


@pytest.mark.parametrize(
    ("count", "visible", "local", "left", "enough"),
    [
        (0, None, "1", None, False),
        (2, None, "1", "1", True),
        (2, "4,7", "1", "7", True),
        (1, None, "1", "", False),
    ],
)
def test_each_rank_sees_its_own_gpu(monkeypatch, capsys, count, visible, local, left, enough):
    names = {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "0"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert one_gpu_each(count) == enough
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left
    too_few = "2 processes on this machine and 1 GPU: computing on the CPU"
    assert (too_few in capsys.readouterr().err) == (left == "")


def test_without_ranks_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with over_ranks("train") as folder:
        assert folder is None
        assert ranks_here() == Alone()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, without RANK, MASTER_ADDR, MASTER_PORT: start the"),
    ],
)
def test_an_environment_that_names_no_ranks_is_refused(monkeypatch, capsys, environment, message):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["evaluate", "--file", "nothing.jsonl"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("found", [lost, _is_known])
def test_an_error_that_is_raised_from_itself_ends_the_search_for_its_cause(found):
    """It never came to its end, and the other ranks waited."""
    error = KeyError("model")
    with suppress(KeyError):
        raise error from error
    assert error.__cause__ is error
    assert not found(error)
