"""What the machine does to a run: full, read-only and forbidden disks, images that go away.

Each fault is a real one. Those that need a file system of their own are skipped, saying so, where
none may be mounted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from bilevel import SGD, BilevelProblem, BilevelSolver
from bilevel.autodiff.random_state import capture
from prm.inputs.tiles import read_image
from recipes.__main__ import main
from recipes.run.checkpoints import Checkpoints, Progress
from recipes.run.errors import StepError, WriteError
from recipes.run.resume import Run
from recipes.run.step_log import append_line
from recipes.train.loop import StepLogging, Training, train
from recipes.train.training import run_training
from tests.tiny_task import model_bits

TOY: dict = {"options": {}, "files": {}, "model": "toy"}


class Disk:
    """A small file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, options: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        subprocess.run(words, check=True, capture_output=True, text=True)

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk")
    made.path.mkdir()
    try:
        made.mount("size=64m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield made
    subprocess.run(["umount", str(made.path)], check=True)


@pytest.fixture
def whole(task, tmp_path):
    return run_training(task.train(tmp_path / "whole", steps=4, save_every=1, keep_checkpoints=0))


def words(whole, run):
    return ["train", "--config", str(whole / "args.yaml"), "--output-dir", str(run)]


def same(run, whole):
    files = ("log.jsonl", "weights.jsonl", "test_questions.jsonl")
    return model_bits(run) == model_bits(whole) and all(
        (run / name).read_bytes() == (whole / name).read_bytes() for name in files
    )


def test_a_full_disk_leaves_the_last_checkpoint(whole, disk, capsys):
    size = sum(file.stat().st_size for file in (whole / "checkpoints/step-1").iterdir())
    disk.remount(f"size={2 * size + size // 2}")  # two checkpoints and not three
    run = disk.path / "run"
    assert main(words(whole, run)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"bilevel-prm train: {run}/checkpoints/step-3: cannot be written (")
    assert "No space left on device" in said
    assert said.endswith(
        f"the state is in {run}/checkpoints/step-2; go on with: bilevel-prm train --resume {run}"
    )
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-1", "step-2"}
    disk.remount("size=64m")
    assert main(["train", "--resume", str(run)]) == 0
    assert same(run, whole)


def test_a_disk_that_is_full_when_the_model_is_written(whole, disk, capsys):
    run = disk.path / "run"
    size = sum(file.stat().st_size for file in (whole / "checkpoints/step-1").iterdir())
    disk.remount(f"size={size + 65536}")
    assert main([*words(whole, run), "--save-every", "4", "--keep-checkpoints", "1"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in said
    assert said.endswith(
        f"the state is in {run}/checkpoints/step-4; go on with: bilevel-prm train --resume {run}"
    )
    disk.remount("size=64m")
    assert main(["train", "--resume", str(run)]) == 0
    assert same(run, whole)


def test_a_disk_that_becomes_read_only(whole, disk, capsys, monkeypatch):
    original, run = BilevelSolver.advance, disk.path / "run"

    def third_finds_it_so(self, state, *rest):
        if int(state.lower_steps) == 2:
            close_below(disk.path)
            disk.remount("ro")
        return original(self, state, *rest)

    monkeypatch.setattr(BilevelSolver, "advance", third_finds_it_so)
    assert main(words(whole, run)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"bilevel-prm train: {run}/log.jsonl: cannot be written (Read-only file system)"
    )
    assert f"the state is in {run}/checkpoints/step-2; go on with: " in said
    disk.remount("rw")
    # It could not be removed, and the process that holds it lives on here: it is this one.
    (run / "lock").unlink()
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0
    assert same(run, whole)


def test_a_new_run_on_a_read_only_disk(whole, disk, capsys):
    disk.remount("ro")
    assert main(words(whole, disk.path / "run")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert str(disk.path / "run") in said
    assert "Read-only file system" in said


def test_a_log_that_cannot_be_written_is_named(disk):
    log = disk.path / "log.jsonl"
    append_line(log, "{}")
    disk.remount("size=4k")
    with pytest.raises(WriteError) as error:
        append_line(log, "x" * 10000)
    assert str(error.value) == f"{log}: cannot be written (No space left on device)"


def close_below(folder):
    """Let this process keep no file of a folder open, by handing it ``/dev/null`` in its place.

    A kernel makes a failing disk read-only under open files; ``mount`` refuses to.
    """
    with open(os.devnull, "wb") as nothing:
        for handle in Path("/proc/self/fd").iterdir():
            if handle.exists() and handle.resolve().is_relative_to(folder):
                os.dup2(nothing.fileno(), int(handle.name))


def toy_state():
    problem = BilevelProblem(
        lambda theta, phi, batch: ((theta["w"] - batch["x"]) ** 2).mean(),
        lambda theta, phi, batch: ((theta["w"] - 1.0) ** 2).mean(),
    )
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1))
    params = torch.zeros(2, dtype=torch.float64)
    return solver, solver.init({"w": params}, {"raw": params})


def test_a_directory_that_may_not_be_written():
    _, state = toy_state()
    folder = Path(tempfile.mkdtemp())  # outside of pytest's, which only its owner may enter
    try:
        folder.chmod(0o755)
        checkpoints = Checkpoints(folder / "checkpoints", every=1, keep=1, identity=TOY)
        checkpoints.save(Progress(state, capture(())))
        for path in (checkpoints.directory, *checkpoints.directory.iterdir()):
            path.chmod(0o555)
        later = Progress(state._replace(lower_steps=torch.tensor(1)), capture(()))
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # whom the bits bind
        try:
            with pytest.raises(WriteError) as error:
                checkpoints.save(later)
        finally:
            if root:
                os.seteuid(0)
        said = f"{checkpoints.directory}/step-1: cannot be written ([Errno 13] Permission denied"
        assert str(error.value).startswith(said)
        assert checkpoints.newest().name == "step-0"
        checkpoints.directory.chmod(0o755)
        assert checkpoints.save(later).name == "step-1"
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("fault", ["vanished", "cut short"])
def test_an_image_that_goes_away_during_the_run(tmp_path, fault):
    """The state is saved before it, and the run is the uninterrupted one once it is back."""
    image, kept = tmp_path / "image.png", tmp_path / "kept.png"
    Image.linear_gradient("L").save(kept)

    def batches(step):
        pixels = torch.tensor(list(read_image(image).convert("L").tobytes()[:4])).double()
        return [{"x": pixels.mean() + step}]

    def go(name, harm, start=None):
        solver, state = toy_state()
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        checkpoints = Checkpoints(folder / "checkpoints", every=0, keep=0, identity=TOY)
        beginning = Progress(state, capture(()))
        run = Run("bilevel-prm toy", folder, checkpoints, beginning, start or beginning)

        def lower(step):
            if step == harm:
                if fault == "vanished":
                    image.unlink()
                else:
                    os.truncate(image, 50)
            return batches(step)

        shutil.copy(kept, image)
        return train(
            run,
            Training(
                solver,
                steps=6,
                lower_batches=lower,
                title="toy",
                on_trouble="raise",
            ),
            StepLogging(1),
        )

    whole = go("whole", None)
    with pytest.raises(StepError) as error:
        go("run", 3)
    said = str(error.value)
    assert said.startswith("toy, step 3: a batch cannot be made: ")
    assert str(image) in said
    assert f"the state is in {tmp_path}/run/checkpoints/step-3; go on with: bilevel-prm toy" in said
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 0, 0, TOY)
    end = go("run", None, checkpoints.load(checkpoints.newest(), toy_state()[1]))
    assert torch.equal(end.state.lower_params["w"], whole.state.lower_params["w"])
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("run", "whole")]
    assert logs[0] == logs[1]
