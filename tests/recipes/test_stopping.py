"""A signal ends training after a complete step, with its state saved."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

from bilevel import BilevelSolver
from recipes.__main__ import main
from recipes.run.errors import Stopped
from recipes.stopping import ending_at_once, interrupting, stop_requests
from recipes.train.training import run_training
from tests.tiny_task import model_bits

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def not_under_nohup():
    """SIGHUP is not ignored: processes that a test starts inherit that it is."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def handlers():
    return [signal.getsignal(number) for number in HANDLED]


@pytest.fixture
def send(monkeypatch):
    """``send(number, step)``: the signal arrives during that lower step, counted from 1."""
    original = BilevelSolver.advance

    def at(number, when):
        steps = iter(range(1, when + 1))

        def step(*args, **more):
            if next(steps, 0) == when:
                signal.raise_signal(number)
            return original(*args, **more)

        monkeypatch.setattr(BilevelSolver, "advance", step)

    yield at
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [
        (signal.SIGINT, "SIGINT", 130),
        (signal.SIGTERM, "SIGTERM", 143),
        (signal.SIGHUP, "SIGHUP", 129),
    ],
)
@pytest.mark.parametrize("save_every", [0, 2])
def test_the_step_is_finished_the_state_saved_and_the_way_on_said(
    task, tmp_path, send, monkeypatch, capsys, number, name, status, save_every
):
    options = task.train(tmp_path / "whole", steps=5)
    whole = run_training(options)
    run = tmp_path / "run"
    words = ["train", "--config", str(whole / "args.yaml"), "--output-dir", str(run)]
    before = handlers()
    send(number, 3)
    assert main([*words, "--save-every", str(save_every)]) == status
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"bilevel-prm train: instance_net: stopped by {name} after 3 of 5 lower steps; the state "
        f"is in {run}/checkpoints/step-3; go on with: bilevel-prm train --resume {run}"
    )
    assert handlers() == before
    monkeypatch.undo()
    assert main(said.partition("go on with: bilevel-prm ")[2].split()) == 0
    assert model_bits(run) == model_bits(whole)
    for file in ("log.jsonl", "weights.jsonl", "test_questions.jsonl"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert not (run / "lock").exists()


def test_loader_processes_that_the_signal_ended_are_no_fault(task, tmp_path, monkeypatch):
    """A signal to all processes of a job; torch says that its workers died, wherever we are."""
    original = BilevelSolver.advance

    def step(self, state, *rest):
        if int(state.lower_steps) == 2:
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")
        return original(self, state, *rest)

    monkeypatch.setattr(BilevelSolver, "advance", step)
    with pytest.raises(Stopped, match="stopped by SIGTERM after 2 of 4 lower steps"):
        run_training(task.train(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "step-2").is_dir()


def test_after_the_last_step_only_the_evaluation_is_left(task, tmp_path, send, monkeypatch):
    options = task.train(tmp_path / "run", steps=3)
    send(signal.SIGTERM, 3)
    with pytest.raises(Stopped, match="after 3 of 3 lower steps"):
        run_training(options)
    monkeypatch.undo()
    monkeypatch.setattr(BilevelSolver, "advance", None)  # none is taken any more
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_the_first_is_remembered_and_the_handlers_come_back(capfd):
    before = handlers()

    def body():
        with stop_requests() as asked:
            assert asked() is None
            signal.raise_signal(signal.SIGTERM)
            assert asked() is signal.SIGTERM
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert handlers() == before
    assert "SIGTERM: stopping after this step" in capfd.readouterr().err


def test_one_that_nobody_looked_at_is_not_lost(capfd):
    with pytest.raises(KeyboardInterrupt), stop_requests():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", HANDLED)
def test_what_is_ignored_stays_ignored(number):
    """As ``nohup`` ignores SIGHUP."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with ending_at_once(), interrupting(), stop_requests() as asked:
            signal.raise_signal(number)
            assert asked() is None
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_another_thread_listens_to_nothing():
    seen = []

    def body():
        with stop_requests() as asked:
            seen.append((handlers(), asked()))

    before = handlers()
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


_SECOND = """
import signal
from recipes.stopping import stop_requests
before = signal.getsignal(signal.SIGTERM)
assert before is signal.SIG_DFL
with stop_requests():
    signal.raise_signal(signal.{number})
    print("first survived", flush=True)
    signal.raise_signal(signal.{number})
    print("second survived", flush=True)
"""


@pytest.mark.parametrize("number", HANDLED)
def test_the_second_ends_the_process_at_once(number):
    code = _SECOND.format(number=number.name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -number
    assert done.stdout == "first survived\n"


_LONG = """
import os, signal, sys
from recipes.__main__ import main
import recipes.train.loop as loop
original = loop.append_line
def append_line(path, line):
    original(path, line)
    if '"step": 3' in line:
        os.write(1, b"ready")  # in one piece
        sys.stdin.read()  # until the terminal is gone
        signal.raise_signal(signal.SIGHUP)
loop.append_line = append_line
sys.exit(main(sys.argv[1:]))
"""


def test_a_closed_terminal_stops_a_run_with_its_state_saved(task, tmp_path):
    """SIGHUP arrives, and what is printed goes nowhere: each write is an error."""
    whole = run_training(task.train(tmp_path / "whole", steps=5, log_every=1))
    run = tmp_path / "run"
    words = ["train", "--config", str(whole / "args.yaml"), "--output-dir", str(run)]
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", _LONG, *words],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as here: the bits depend on it
    )
    os.close(theirs)
    said = b""
    while b"ready" not in said:
        said += os.read(ours, 1000)
    os.close(ours)
    child.communicate()
    assert child.returncode == 129, said.decode()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-3"]
    assert main(["train", "--resume", str(run)]) == 0
    assert model_bits(run) == model_bits(whole)


_HOOK = """
import os, sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), int(os.environ["NUMBER"]))
sys.meta_path.insert(0, Hook())
"""


@pytest.mark.parametrize("number", HANDLED)
@pytest.mark.parametrize(
    "module",
    [
        *("recipes.command_line", "yaml", "recipes.options.train", "recipes.commands", "numpy"),
        *("torch", "torch._C", "torch.optim", "transformers", "prm.models.model", "safetensors"),
        *("recipes.train.training",),
    ],
)
def test_a_signal_while_modules_are_imported_ends_quietly(tmp_path, module, number):
    (tmp_path / "sitecustomize.py").write_text(_HOOK)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "recipes", "train", "--train-file", "none", "--output-dir", "none"],
        env={**os.environ, "PYTHONPATH": path, "AT": module, "NUMBER": str(int(number))},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


@pytest.mark.parametrize("number", HANDLED)
def test_work_is_interrupted_by_the_first_signal_alone(number):
    before = handlers()
    inside = []

    def work():
        with ending_at_once():
            outer = handlers()
            with interrupting():
                try:
                    signal.raise_signal(number)
                finally:
                    inside.append(handlers() == outer)  # so that the second ends the process

    with pytest.raises(KeyboardInterrupt) as stop:
        work()
    assert stop.value.number == number
    assert inside == [True]
    assert handlers() == before
