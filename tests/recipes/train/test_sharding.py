"""``--sharding full``: the run of one process by other code, on any number of ranks.

The one process takes functional steps of a whole model; in float64 both come to the same.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bilevel import RankError
from bilevel.shards import checkpoint
from prm.models.model import load_prm
from prm.placement import Placement
from recipes.__main__ import main
from recipes.options.parse import changed
from recipes.options.rules import _PROVEN_IN_SHARDS, words_of
from recipes.options.train import TrainOptions
from recipes.options.values import OptionError
from recipes.run import checkpoints
from recipes.run.checkpoints import Checkpoints
from recipes.run.errors import WriteError
from recipes.train.sharding import check_sharding
from recipes.train.training import run_training
from tests.rank_processes import ROOT, SECONDS, environment
from tests.recipes.rank_commands import free_port
from tests.tiny_task import SYSTEM_PROMPT, read_lines

STEPS = 4
NET = {"normalise": "none", "no_centre": True}  # what compares the examples of a batch has one
WEIGHTINGS = {
    "net": NET,
    "table": {"weighting": "table", "normalise": "table", "upper_optimizer": "lazy-adam"},
    "domain": {"weighting": "domain", "direction_decay": 0.0, "unroll_steps": 2},
    "none": {"weighting": "none"},
}


def flags(**options) -> list[str]:
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


def common(task, **more) -> dict:
    """Six micro-batches a step, which one, two and three ranks can share."""
    return {
        "model": task.model,
        "system_prompt": SYSTEM_PROMPT,
        "train_file": task.data / "train.jsonl",
        "batch_size": 1,
        "accumulation": 6,
        "lower_warmup": 0.0,
        "lower_max_norm": 0.05,  # which is active
        "freeze": "vision_tower",
        "log_every": 1,
        **more,
    }


def training(task, output: Path, **more) -> list[str]:
    options = {
        "test_file": task.data / "test.jsonl",
        "steps": STEPS,
        "eval_batch_size": 3,
        "output_dir": output,
        **more,
    }
    if more.get("weighting") != "none":
        options = {
            "meta_file": task.data / "meta.jsonl",
            "meta_batch_size": 5,
            "upper_start": 1,
            "upper_optimizer": "sgd",
            "upper_lr": 0.1,
            **options,
        }
    return ["train", *flags(**common(task, **options))]


def cold(task, output: Path, **more) -> list[str]:
    options = common(task, steps=3, draw=10, output_dir=output, **more)
    return ["cold-start", *flags(**options)]


def command(name: str, ranks: int, arguments: list[str], **fault) -> dict:
    arguments = list(map(str, arguments))
    return {"name": name, "ranks": ranks, "arguments": arguments, "port": free_port(), **fault}


def stop(rank: int, number: int, step: int = 2) -> dict:
    return {"fault": [step, rank, int(number)]}


@pytest.fixture(scope="module")
def ran(task, tmp_path_factory) -> Path:
    """All runs."""
    folder = tmp_path_factory.mktemp("shards")
    full = {"sharding": "full", "save_every": 2, "keep_checkpoints": 0, **NET}

    def go_on(name: str) -> list[str]:
        return ["train", "--resume", folder / name]

    commands = [
        command("3 to 2", 3, training(task, folder / "3 to 2", **full), **stop(1, signal.SIGTERM)),
        command("3 to 2", 2, go_on("3 to 2")),
        command(
            "2 to 1", 2, training(task, folder / "2 to 1", **full), **stop(0, signal.SIGTERM, 3)
        ),
        command("2 to 1", 1, go_on("2 to 1")),
        command("1 to 2", 1, training(task, folder / "1 to 2", **full), **stop(0, signal.SIGTERM)),
        command("1 to 2", 2, go_on("1 to 2")),
        command("whole", 2, training(task, folder / "whole", **full | {"save_every": 1})),
    ]
    newest = full | {"save_every": 1, "keep_checkpoints": 1}
    for name, more in WEIGHTINGS.items():
        alone = training(task, folder / f"{name} alone", **more)
        commands.append(command("alone", 1, alone))
        if name != "net":
            shared = training(task, folder / f"{name} shared", sharding="full", **more)
            commands.append(command(name, 2, shared))
    commands += [
        command("alone", 1, cold(task, folder / "cold alone")),
        command("cold", 2, cold(task, folder / "cold shared", sharding="full")),
        command(
            "killed",
            2,
            training(task, folder / "killed", **newest),
            held=[2, 1],
            **stop(1, signal.SIGKILL, 3),
        ),
        command("killed", 2, go_on("killed")),
        command("error", 2, training(task, folder / "error", **full), **stop(1, 0, 3)),
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.shard_commands", str(folder)],
        cwd=ROOT,
        env=environment(),
        timeout=SECONDS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def statuses(folder: Path, rank: int, name: str) -> list[int]:
    lines = (folder / f"statuses-{rank}.txt").read_text().splitlines()
    found = [line.rpartition(" ") for line in lines]
    return [int(status) for command, _, status in found if command == name]


def printed(folder: Path, rank: int) -> str:
    return (folder / f"output-{rank}.txt").read_text()


def assert_alike(run: Path, other: Path, tolerance: float = 1e-12) -> None:
    """What two runs learned, and what they logged and reported of it."""
    for name in ("model/model.safetensors", "weighting/params.safetensors"):
        if name.startswith("weighting") and not (run / name).exists():
            continue
        one, two = load_file(run / name), load_file(other / name)
        assert one.keys() == two.keys()
        for key, leaf in one.items():
            assert leaf.dtype == torch.float64
            assert (two[key] - leaf).norm() <= tolerance * max(1.0, leaf.norm()), (name, key)
    for name in ("log.jsonl", "weights.jsonl"):
        if not (run / name).exists():
            continue
        for line, same in zip(read_lines(run / name), read_lines(other / name), strict=True):
            # Several ranks do not log scores of meta solutions: each knows those of its part.
            line, same = (
                {key: value for key, value in one.items() if not key.startswith("meta/")}
                for one in (line, same)
            )
            assert line.keys() == same.keys()
            for key, value in line.items():
                close = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
                assert same[key] == close, (name, key)
    results = [json.loads((one / "results.json").read_text()) for one in (run, other)]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}


@pytest.mark.parametrize("name", ["3 to 2", "2 to 1", "1 to 2", "whole"])
def test_a_run_over_shards_is_that_of_one_process_on_any_ranks(ran, name):
    """Stopped by a signal to one rank, and gone on with on another number of them."""
    assert_alike(ran / "net alone", ran / name)


@pytest.mark.parametrize("name", ["table", "domain", "none", "cold"])
def test_other_runs_over_shards_are_those_of_one_process(ran, name):
    assert_alike(ran / f"{name} alone", ran / f"{name} shared")


def test_every_command_ended_as_it_should(ran):
    stopped = [143, 0]
    assert statuses(ran, 0, "3 to 2") == statuses(ran, 1, "3 to 2") == stopped
    assert statuses(ran, 2, "3 to 2") == [143]
    assert statuses(ran, 0, "2 to 1") == statuses(ran, 0, "1 to 2") == stopped
    assert statuses(ran, 0, "alone") == [0] * 5
    for name in ("whole", "table", "domain", "none", "cold"):
        assert statuses(ran, 0, name) == statuses(ran, 1, name) == [0]


def test_a_signal_leaves_one_complete_checkpoint_of_all_shards(ran):
    assert "stopped by SIGTERM after 2 of 4 lower steps; the state is in" in printed(ran, 0)


def test_a_checkpoint_is_in_shards(ran):
    """Each rank has written a file, of a part of θ, its moments and the average."""
    folder = ran / "whole/checkpoints/step-4/shards"
    sealed = json.loads((folder / "seal.json").read_text())["files"]
    held = [sum(leaf.numel() for leaf in load_file(folder / name).values()) for name in sealed]
    assert len(held) == 2
    assert min(held) > 0.4 * sum(held)


def test_a_checkpoint_that_was_written_aside_is_that_of_one_that_training_waited_for(ran):
    """The third step was due on one run, and a signal stopped the other after it."""
    aside, waited = (ran / name / "checkpoints/step-3" for name in ("whole", "2 to 1"))
    assert not json.loads((waited / "run.json").read_text())["due"]
    files = [file.relative_to(waited) for file in waited.rglob("*.safetensors")]
    assert len(files) == 3
    for file in files:  # The order of names in a file's header is another one each time.
        one, two = load_file(aside / file), load_file(waited / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_that_a_kill_left_unfinished_is_not_there(ran):
    """Rank 1 was killed a step after the second checkpoint had begun; the first stayed."""
    told = printed(ran, 0)
    assert f"the state is in {ran}/killed/checkpoints/step-1; go on with: " in told
    assert f"{ran}/killed: resumed after 1 of 4 lower steps" in told
    assert [path.name for path in (ran / "killed/checkpoints").iterdir()] == ["step-4"]


def test_a_killed_rank_ends_the_others_and_the_run_resumes_bit_for_bit(ran):
    (status, again) = statuses(ran, 0, "killed")
    assert (status, again) == (1, 0)
    assert "another rank is gone or does not answer" in printed(ran, 0)
    assert f"go on with: bilevel-prm train --resume {ran / 'killed'}" in printed(ran, 0)
    for name in ("model/model.safetensors", "weighting/params.safetensors", "log.jsonl"):
        assert (ran / "whole" / name).read_bytes() == (ran / "killed" / name).read_bytes(), name
    for name in ("weights.jsonl",):
        assert (ran / "whole" / name).read_text() == (ran / "killed" / name).read_text()


def test_an_error_of_one_rank_ends_all_and_is_said_by_it(ran):
    assert statuses(ran, 0, "error") == statuses(ran, 1, "error") == [1]
    assert "rank 1: bilevel-prm train: a picture is gone" in printed(ran, 1)
    newest = ran / "error" / "checkpoints"
    assert [path.name for path in newest.iterdir()] == ["step-2"]


OTHERS = {
    "hypergradient": "unrolled",
    "order": "lower-first",
    "route": "ghost",
    "upper_gradient_every": 2,
    "rollback": True,
    "keep_best": True,
    "batch_size": 2,
    "loss_target": "pairs",
    "lower_data": "meta",
    "weights_file": "weights.jsonl",
    "weighting": "labels",
    "execution": "functional",
    "on_trouble": "skip",
    "lora_rank": 2,
    "frozen_activations": "memory",
    "activation_checkpointing": "all",
    "device": "cuda",
    "precision": "bf16",
}
"""A value of each option that has not been shown to be right over shards."""
UNWEIGHTED = {"lower_data", "weights_file"}


def test_each_limit_of_shards_is_tried():
    assert OTHERS.keys() == _PROVEN_IN_SHARDS.keys()


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_proven_is_refused_before_the_model_is_loaded(tmp_path, capsys, name):
    """There is no model."""
    options = {
        "model": tmp_path / "none",
        "train_file": tmp_path / "none",
        "meta_file": tmp_path / "none",
        "output_dir": tmp_path / "run",
        "batch_size": 1,
        "sharding": "full",
        name: OTHERS[name],
    }
    if name == "keep_best":
        options |= {"eval_every": 1, "dev_file": tmp_path / "none"}
    if name in UNWEIGHTED:
        options["weighting"] = "none"
        if name == "weights_file":
            del options["meta_file"]
    assert main(["train", *map(str, flags(**options))]) == 2
    told = capsys.readouterr().err
    given = " ".join(words_of(name, OTHERS[name]))
    assert f"--sharding full {given}: not shown to be right over shards: use " in told
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Ranks:
    """So many of them."""

    ranks: int


@pytest.mark.parametrize(
    ("more", "placement", "told"),
    [
        ({"accumulation": 3}, Placement(), "--accumulation 3: the 2 processes need as many"),
        ({"meta_batch_size": 1}, Placement(), "--meta-batch-size 1: each of the 2 processes"),
        ({}, Placement(torch.device("cuda", 0)), "not shown to be right on cuda:0 in float32"),
        ({}, Placement(precision="bf16"), "not shown to be right on cpu in bf16"),
    ],
)
def test_what_the_ranks_cannot_share_is_refused(task, tmp_path, more, placement, told):
    given = {"batch_size": 1, "accumulation": 2, "sharding": "full", **more}
    options = task.train(tmp_path, **given)
    with pytest.raises(OptionError, match=re.escape(told)):
        check_sharding(options, placement, Ranks(2))
    check_sharding(task.train(tmp_path), placement, Ranks(2))


@pytest.fixture(scope="module")
def saved(task, tmp_path_factory) -> TrainOptions:
    """A run of one process over shards, which has ended after a checkpoint."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    options = task.train(
        folder,
        batch_size=1,
        steps=2,
        weighting="table",
        normalise="table",
        sharding="full",
        save_every=1,
    )
    run_training(options)
    (folder / "results.json").unlink()
    return options


def copied(options: TrainOptions, folder: Path, **more) -> TrainOptions:
    shutil.copytree(options.output_dir, folder)
    return changed(options, output_dir=str(folder), resume=str(folder), **more)


@pytest.mark.parametrize("name", ["shards/seal.json", "random.safetensors", "run.json", "shard"])
def test_a_checkpoint_over_shards_that_has_changed_is_refused(saved, tmp_path, name):
    options = copied(saved, tmp_path / "run")
    there = tmp_path / "run" / "checkpoints" / "step-2"
    file = there / name if name != "shard" else next((there / "shards").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(OptionError, match="--resume"):
        run_training(options)


def test_other_ranks_refuse_it_with_the_same_sentence(saved, tmp_path, monkeypatch):
    """They read their parts of the shards and nothing else of a checkpoint."""
    options = copied(saved, tmp_path / "run")
    file = next((tmp_path / "run/checkpoints/step-2/shards").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    read = Checkpoints.load_shards
    monkeypatch.setattr(Checkpoints, "load", lambda self, *given, in_place: read(self, *given))
    with pytest.raises(OptionError, match=r"--resume: .*step-2 cannot be read \(.*; remove it"):
        run_training(options)


def test_a_rank_that_is_gone_is_no_fault_of_the_checkpoint(saved, tmp_path, monkeypatch):
    def gone(*given):
        raise RankError("another rank is gone")

    monkeypatch.setattr(checkpoints, "load_shards", gone)
    with pytest.raises(RankError, match=r"^another rank is gone$"):
        run_training(copied(saved, tmp_path / "run"))


def test_an_error_of_writing_while_training_goes_on_ends_the_run(saved, tmp_path, monkeypatch):
    """It is seen where the next checkpoint is due, and the one before is kept."""
    (tmp_path / "run").mkdir()
    options = changed(saved, output_dir=str(tmp_path / "run"), steps=3)
    write = checkpoint._write

    def full(path: Path, *others) -> None:
        if path.parent.name == "step-2":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *others)

    monkeypatch.setattr(checkpoint, "_write", full)
    there = tmp_path / "run" / "checkpoints"
    sentence = rf"{there / 'step-2'}: cannot be written \(.*No space left on device.*step-1; go on"
    with pytest.raises(WriteError, match=sentence):
        run_training(options)
    assert [path.name for path in there.iterdir()] == ["step-1"]
    assert [line["step"] for line in read_lines(tmp_path / "run/log.jsonl")] == [1, 2, 3]


def test_a_run_goes_on_as_it_began_in_shards_or_whole(saved, tmp_path):
    options = copied(saved, tmp_path / "run", sharding="none")
    with pytest.raises(OptionError, match=re.escape("--sharding none (checkpoint: full)")):
        run_training(options)


def test_the_model_is_written_whole_as_transformers_writes_it(saved, task):
    written = Path(saved.output_dir) / "model"
    before, after = (
        load_file(task.model / "model.safetensors"),
        load_file(written / "model.safetensors"),
    )
    assert {name: leaf.shape for name, leaf in after.items()} == {
        name: leaf.shape for name, leaf in before.items()
    }
    tower = [name for name in before if "vision_tower" in name]
    assert all(torch.equal(before[name], after[name]) for name in tower)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert load_prm(written).plus_id == load_prm(task.model).plus_id
    assert not list(written.parent.glob(".model-*"))
