"""The loop: the steps of a hand-written one, callbacks, checkpoints, batches that end."""

from __future__ import annotations

import io
import os

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bilevel import SGD, AdamW, BilevelSolver, OneStep, ReweightingProblem, Unrolled, tree
from bilevel.fit import (
    FitStep,
    checkpoint,
    early_stop,
    fit,
    load_checkpoint,
    log,
    losses,
    progress,
)

ROWS = 12


def per_example(theta, batch):
    return (torch.dropout(batch[0], 0.5, True) @ theta["w"] - batch[1]).square(), None


PROBLEM = ReweightingProblem(
    per_example,
    lambda phi, batch, features: torch.sigmoid(phi["rows"][batch[2]]),
    lambda theta, phi, batch: per_example(theta, batch)[0].mean(),
)


def rows(seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 3, generator=generator)
    return TensorDataset(x, x.sum(1), torch.arange(ROWS))


def loaders() -> tuple[DataLoader, DataLoader]:
    shuffled = torch.Generator().manual_seed(3)
    return DataLoader(rows(1), 4, shuffle=True, generator=shuffled), DataLoader(rows(2), 6)


def make(hypergradient=None, **rest) -> BilevelSolver:
    return BilevelSolver(PROBLEM, AdamW(0.05), SGD(0.1), hypergradient or OneStep(), **rest)


def start(solver):
    torch.manual_seed(0)
    return solver.init({"w": torch.zeros(3)}, {"rows": torch.zeros(ROWS)})


def same(one, other) -> bool:
    pairs = zip(tree.leaves(one), tree.leaves(other), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def test_the_loop_takes_the_steps_of_a_hand_written_one() -> None:
    """Windows of 3 steps of 2 micro-batches; 10 steps: the last one makes no window."""
    solver = make(Unrolled(), unroll_steps=3, accumulation=2)
    lower, upper = loaders()
    lower, upper = [batch for _ in range(7) for batch in lower], list(upper) * 2
    found = fit(solver, start(solver), iter(lower), upper, steps=10)
    state = start(solver)
    for window in range(3):
        micro = lower[6 * window : 6 * window + 6]
        pairs = [micro[:2], micro[2:4], micro[4:]]
        state, _ = solver.window(state, pairs, upper[window])
    state, _ = solver.advance(state, [lower[18:20]])
    assert same(found, state)
    assert (int(found.lower_steps), int(found.upper_steps)) == (10, 3)


def test_callbacks_are_told_of_every_step_in_order() -> None:
    told: list[tuple[str, int]] = []
    solver = make()
    fit(
        solver,
        start(solver),
        *loaders(),
        steps=3,
        callbacks=[
            lambda step: told.append(("a", int(step.state.lower_steps))),
            lambda step: told.append(("b", int(step.state.lower_steps))),
        ],
    )
    assert told == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3)]


def test_a_run_that_stopped_goes_on_from_its_checkpoint_bit_for_bit(tmp_path) -> None:
    """With dropout, so that the random state counts, and batches that go on, too."""
    solver, file = make(), tmp_path / "state.pt"
    lower, upper = loaders()
    batches, upper = [batch for _ in range(4) for batch in lower], list(upper) * 8
    whole = fit(solver, start(solver), batches, upper, steps=12)
    half = [checkpoint(file, every=5), lambda step: int(step.state.lower_steps) == 6]
    fit(solver, start(solver), batches, upper, steps=12, callbacks=half)
    torch.manual_seed(99)
    state = load_checkpoint(file, start(solver))
    assert int(state.lower_steps) == 5
    found = fit(solver, state, batches[5:], upper[5:], steps=12)
    assert same(found, whole)
    assert os.listdir(tmp_path) == ["state.pt"]


def test_a_checkpoint_has_the_permissions_of_any_new_file(tmp_path) -> None:
    solver, file = make(), tmp_path / "state.pt"
    fit(solver, start(solver), *loaders(), steps=1, callbacks=[checkpoint(file, every=1)])
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_checkpoint_of_another_problem_is_refused(tmp_path) -> None:
    solver, file = make(), tmp_path / "state.pt"
    fit(solver, start(solver), *loaders(), steps=1, callbacks=[checkpoint(file, every=1)])
    with pytest.raises(ValueError, match="saved with another model"):
        load_checkpoint(file, solver.init({"v": torch.zeros(3)}, {"rows": torch.zeros(ROWS)}))


@pytest.mark.parametrize("content", ["cut", "text", "other", "empty"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content) -> None:
    path, state = tmp_path / "state.pt", {"w": torch.ones(2)}
    torch.save(state, path)
    written = {"cut": path.read_bytes()[:-100], "text": b"no zip", "empty": b""}
    path.write_bytes(written.get(content, path.read_bytes()))
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"state\.pt: expected a whole file of bilevel\.fit"):
        load_checkpoint(path, state)
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt", state)


def test_early_stopping_counts_the_times_that_a_figure_did_not_fall() -> None:
    values = iter([3.0, 2.0, None, 2.5, 1.95, float("nan"), 1.0])
    stop = early_stop(lambda step: next(values), patience=3, least=0.1)
    step = FitStep(start(make()), (), 9)
    assert [stop(step) for _ in range(6)] == [False, False, False, False, False, True]


def test_the_log_has_losses_and_figures_of_every_nth_step() -> None:
    lines: list[dict[str, float]] = []
    steps: list[FitStep] = []
    solver = make(unroll_steps=2)
    fit(
        solver,
        start(solver),
        *loaders(),
        steps=4,
        callbacks=[steps.append, log(lines.append, every=2)],
    )
    assert lines == [{"step": n, **losses(steps[n - 1])} for n in (2, 4)]
    assert set(losses(steps[0])) == {"lower_loss"}
    assert set(losses(steps[1])) == {"lower_loss", "upper_loss"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Terminal(), True), (io.StringIO(), False)])
def test_progress_is_shown_in_terminals_alone(stream, shown) -> None:
    solver = make()
    callbacks = [progress(stream, seconds=1e9)]
    fit(solver, start(solver), *loaders(), steps=3, callbacks=callbacks)
    text = stream.getvalue()
    assert ("1/3 lower_loss" in text, text.endswith("\n"), "2/3" in text) == (shown, shown, False)
    assert ("3/3 lower_loss" in text) == shown


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        (lambda loader: iter(list(loader)), list, r"lower_batches ended after 3 batches.*DataLoad"),
        (list, lambda loader: iter(list(loader)), "upper_batches ended after 2 batches"),
        (lambda loader: [], list, "lower_batches has 0 batches"),
    ],
)
def test_batches_that_end_too_early_are_named(lower, upper, message) -> None:
    solver = make()
    first, second = loaders()
    with pytest.raises(ValueError, match=message):
        fit(solver, start(solver), lower(first), upper(second), steps=5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(make(), start(make()), [], [], steps=0), "fit: steps must be at least 1"),
        (lambda: log(print, every=0), "log: every must be at least 1, got 0"),
        (lambda: checkpoint("x", every=-1), "checkpoint: every must be at least 1, got -1"),
        (lambda: early_stop(lambda step: 0.0, patience=0), "early_stop: patience must be at least"),
    ],
)
def test_counts_below_one_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 2.5}, "fit: steps must be a whole number, got 2.5"),
        ({"steps": 2, "callbacks": [3]}, "fit: callbacks must be a list of functions"),
        ({"steps": 2, "callbacks": print}, "fit: callbacks must be a list of functions"),
    ],
)
def test_wrong_kinds_are_refused(given, message) -> None:
    solver = make()
    with pytest.raises(TypeError, match=message):
        fit(solver, start(solver), *loaders(), **given)
