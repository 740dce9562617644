"""Numerical trouble is found, named, counted, and costs what it is said to cost."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch

from bilevel import SGD, AdamW, BilevelProblem, BilevelSolver, OneStep, Reverse, StepInfo, Unrolled
from bilevel import tree as trees
from bilevel.autodiff.random_state import capture
from recipes.run.checkpoints import Checkpoints, Progress
from recipes.run.errors import NonFiniteError
from recipes.run.resume import Run
from recipes.run.step_log import Unlogged
from recipes.run.trouble import GIVE_UP, Seen, Trouble, find_troubles, read_steps
from recipes.train.loop import StepLogging, Training, train
from tests.tiny_task import read_lines
from weighting import InstanceNet

INF, NAN = math.inf, math.nan


def info(**given) -> StepInfo:
    values = {"lower_loss": 1.0, "lower_grad_norm": 1.0, "lower_clipped": 0.0} | given
    tensors = {name: None if v is None else torch.tensor(v) for name, v in values.items()}
    rest = dict.fromkeys(("losses", "weights", "upper_loss", "hypergradient_norm", "upper_clipped"))
    return StepInfo(**{**rest, **tensors, "notes": ()})


@dataclass(frozen=True)
class Found:
    lower: float = 1.0
    upper: float = 1.0
    steps: int = 5
    skipped: int = 0


def state_of(found: Found):
    solver = BilevelSolver(problem(), AdamW(0.1), SGD(0.1), OneStep(Reverse()))
    made = solver.init({"w": torch.tensor([found.lower])}, {"raw": torch.tensor([found.upper])})
    return solver, made._replace(
        lower_steps=torch.tensor(found.steps), upper_skipped=torch.tensor(found.skipped)
    )


def kinds(infos, *, after=None, seen=None, weighting=None, before=None, method=None):
    solver, start = state_of(before or Found())
    if method is not None:
        solver = replace(solver, hypergradient=method)
    _, end = state_of(after or Found())
    found = find_troubles(solver, weighting, start, end, read_steps(end, infos), seen or Seen({}))
    return [(trouble.kind, trouble.rejects) for trouble in found]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"lower_loss": 0}, "lower_loss_not_finite"),
        ({"lower_grad_norm": 0}, "lower_gradient_not_finite"),
        ({"upper_loss": 0}, "upper_loss_not_finite"),
        ({"hypergradient_norm": 0}, "hypergradient_not_finite"),
    ],
)
def test_figures_that_are_not_finite(given, kind, bad):
    (name,) = given
    assert kinds([info(**{name: bad}), info()]) == [(kind, True)]
    assert kinds([info(), info(**{name: bad})]) == [(kind, True)]


def test_weights_and_parameters_that_are_not_finite():
    assert kinds([info(weights=[1.0, NAN])]) == [("weights_not_finite", True)]
    assert kinds([info()], after=Found(lower=NAN)) == [("parameters_not_finite", True)]
    assert kinds([info()], after=Found(upper=INF)) == [("parameters_not_finite", True)]
    # The cause is named, not what follows from it.
    from_weights = info(weights=[1.0, NAN], losses=[1.0, 1.0], lower_loss=NAN)
    assert kinds([from_weights]) == [("weights_not_finite", True)]
    from_model = info(weights=[NAN, NAN], losses=[1.0, NAN], lower_loss=NAN)
    assert kinds([from_model]) == [("lower_loss_not_finite", True)]
    assert kinds([info(lower_loss=NAN)], after=Found(lower=NAN)) == [
        ("lower_loss_not_finite", True)
    ]


def test_a_hypergradient_that_the_core_left_out_costs_no_more_than_its_upper_step():
    alone = info(hypergradient_norm=NAN, upper_loss=NAN)
    assert kinds([alone], after=Found(skipped=1)) == [("upper_loss_not_finite", False)]
    with_lower = info(lower_loss=NAN, hypergradient_norm=NAN)
    assert kinds([with_lower], after=Found(skipped=1)) == [("lower_loss_not_finite", True)]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (2.01e4, [("hypergradient_exploded", True)]),
        (1.99e4, []),
        (1.99e-6, [("hypergradient_vanished", False)]),
        (2.01e-6, []),
        (0.0, [("hypergradient_vanished", False)]),
    ],
)
def test_size_is_that_against_the_median_of_the_last(norm, expected):
    enough = Seen({}, [1.0, 2.0, 3.0] * 3 + [2.0])
    assert kinds([info(hypergradient_norm=norm)], seen=enough) == expected
    few = Seen({}, [2.0] * 9)
    alone = [("hypergradient_vanished", False)] if norm == 0 else []
    assert kinds([info(hypergradient_norm=norm)], seen=few) == alone


@pytest.mark.parametrize(
    ("method", "taken", "cold"),
    [
        (OneStep(Reverse(), order="lower-first"), 1, True),
        (OneStep(Reverse(), order="upper-first"), 1, False),
        (Unrolled(), 1, True),
        (Unrolled(), 2, False),
    ],
)
def test_the_first_step_of_adam(method, taken, cold):
    infos = [info(hypergradient_norm=1.0)] * taken
    expected = [("cold_optimizer", False)] if cold else []
    first, second = Found(steps=taken), Found(steps=taken + 1)
    assert kinds(infos, before=Found(steps=0), after=first, method=method) == expected
    assert kinds(infos, before=Found(steps=1), after=second, method=method) == []


def test_effective_sample_size():
    collapsed = [("effective_sample_size_collapsed", False)]
    # (1 + 7 a)² / (1 + 7 a²) of eight examples: 1.35 and 1.79.
    for rest, expected in ((0.0234, collapsed), (0.05, [])):
        found = kinds([info(hypergradient_norm=1.0, weights=[1.0] + [rest] * 7)])
        assert found == expected
    many = [1.0] * 3 + [0.0] * 37  # 3 of 40: less than a tenth
    assert kinds([info(hypergradient_norm=1.0, weights=many)]) == collapsed
    assert kinds([info(hypergradient_norm=1.0, weights=[1.0] * 4 + [0.0] * 36)]) == []
    assert kinds([info(hypergradient_norm=1.0, weights=[1.0])]) == []
    assert kinds([info(weights=many)]) == []  # judged at upper steps


def test_all_weights_at_the_bound_are_named():
    step = info(hypergradient_norm=1.0, weights=[0.0, 1.0, 1.0])
    assert kinds([step], weighting=InstanceNet(1)) == [("weights_at_bound", False)]


def test_what_is_remembered():
    rejecting, noted = Trouble("a", "", True), Trouble("b", "", False)
    seen = Seen({}).after([], [info(), info(hypergradient_norm=2.0)])
    assert seen == Seen({}, [2.0], 0)
    seen = seen.after([noted, rejecting], [info(hypergradient_norm=7.0)])
    assert seen == Seen({"a": 1, "b": 1}, [2.0], 1)
    seen = seen.after([rejecting], [info()])
    assert (seen.counts, seen.in_a_row) == ({"a": 2, "b": 1}, 2)
    assert seen.after([noted], [info()]).in_a_row == 0
    for norm in range(30):
        seen = seen.after([], [info(hypergradient_norm=float(norm))])
    assert list(seen.norms) == [float(norm) for norm in range(10, 30)]


# A problem whose batches say what goes wrong, with random numbers, moments and an average of v.


@pytest.fixture(params=["looked at", "read late"], autouse=True)
def _steps(request, monkeypatch):
    """Steps are judged one by one, or as on a device, where they are read some at a time."""

    def late(solver, *_):
        return isinstance(solver.hypergradient, OneStep)

    if request.param == "read late":
        monkeypatch.setattr("recipes.train.loop.are_possible", late)


def problem() -> BilevelProblem:
    def lower_loss(theta, phi, batch):
        noise = torch.rand(4, dtype=torch.float64)
        loss = (torch.sigmoid(phi["raw"]) * noise * (theta["w"] - 1.0) ** 2).mean()
        return loss * batch["lower"]

    def upper_loss(theta, phi, batch):
        return (((theta["w"] - 2.0) ** 2) * torch.rand((), dtype=torch.float64)).sum() * batch[
            "upper"
        ]

    return BilevelProblem(lower_loss, upper_loss)


def batch(value):
    return {"lower": torch.tensor(value), "upper": torch.tensor(value)}


def toy(method=None):
    solver = BilevelSolver(
        problem(),
        AdamW(0.05),
        AdamW(0.1),
        method or OneStep(Reverse(), order="upper-first", direction_decay=0.5),
        unroll_steps=1 if method is None else 2,
    )
    params = torch.linspace(0, 0.3, 4, dtype=torch.float64)
    return solver, solver.init({"w": params}, {"raw": params})


def run_toy(
    folder, on_trouble, *, lower=None, upper=None, method=None, steps=8, every=3, start=None
):
    """``lower`` and ``upper``: factor of the loss at a step, from 0; else 1."""
    solver, state = toy(method)
    torch.manual_seed(1)
    beginning = Progress(state, capture(()))
    checkpoints = Checkpoints(folder / "checkpoints", every=every, keep=0, identity=TOY)
    folder.mkdir(exist_ok=True)
    run = Run("bilevel-prm toy", folder, checkpoints, beginning, start or beginning)
    return train(
        run,
        Training(
            solver,
            steps=steps,
            lower_batches=lambda step: [batch((lower or {}).get(step, 1.0))],
            title="toy",
            on_trouble=on_trouble,
            upper_batch=lambda step: batch((upper or {}).get(step, 1.0)),
        ),
        StepLogging(4),
    )


TOY: dict = {"options": {}, "files": {}, "model": "toy"}


def same(one, other, *, but=()):
    pairs = zip(trees.flatten(one).items(), trees.flatten(other).values(), strict=True)
    return all(torch.equal(a, b) for (name, a), b in pairs if name not in but)


def stateat(folder, steps):
    _, state = toy()
    checkpoints = Checkpoints(folder / "checkpoints", every=3, keep=0, identity=TOY)
    return checkpoints.load(checkpoints.named(steps), state)


def test_raise_ends_with_the_state_before_the_step(tmp_path):
    run_toy(tmp_path / "good", "raise", every=1)
    with pytest.raises(NonFiniteError) as error:
        run_toy(tmp_path / "bad", "raise", lower={5: NAN})
    said = str(error.value)
    assert said.startswith("toy, step 5: lower_loss is nan. Lower the learning rate (--lower-lr")
    assert said.endswith(
        f"After 5: the state is in {tmp_path}/bad/checkpoints/step-5; go on with: bilevel-prm toy"
    )
    kept = stateat(tmp_path / "bad", 5)
    assert same(kept.state, stateat(tmp_path / "good", 5).state)
    # The same run goes on from there if it may leave the step out.
    end = run_toy(tmp_path / "bad", "skip", lower={5: NAN}, start=kept)
    assert int(end.state.lower_steps) == 8


def test_skip_leaves_everything_as_it_was_bit_for_bit(tmp_path, capsys):
    end = run_toy(tmp_path / "run", "skip", lower={4: NAN}, every=1)
    before, after = stateat(tmp_path / "run", 4), stateat(tmp_path / "run", 5)
    assert same(before.state, after.state, but=("lower_steps",))
    assert int(after.state.lower_steps) == 5
    assert torch.equal(before.random.cpu, after.random.cpu)
    assert end.seen.counts == {"lower_loss_not_finite": 1}
    assert "toy, step 4: lower_loss is nan. The step is not taken" in capsys.readouterr().err
    first, second = read_lines(tmp_path / "run" / "log.jsonl")
    assert "troubles" not in first
    assert (second["troubles"], second["skipped_steps"]) == ({"lower_loss_not_finite": 1}, [5])
    # As if the data had not had that step at all.
    without = run_toy(tmp_path / "without", "skip", steps=7)
    assert same(without.state, end.state, but=("lower_steps",))


def test_skip_leaves_out_a_window(tmp_path):
    end = run_toy(tmp_path / "run", "skip", lower={5: NAN}, method=Unrolled(), every=1)
    assert int(end.state.upper_steps) == 3
    assert same(
        run_toy(tmp_path / "without", "skip", steps=6, method=Unrolled()).state,
        end.state,
        but=("lower_steps",),
    )
    assert read_lines(tmp_path / "run" / "log.jsonl")[1]["skipped_steps"] == [5, 6]


def test_a_bad_meta_batch_costs_its_upper_step(tmp_path):
    end = run_toy(tmp_path / "run", "skip", upper={4: NAN}, every=1)
    before, after = stateat(tmp_path / "run", 4), stateat(tmp_path / "run", 5)
    for name in ("upper_params", "upper_optimizer", "memory"):
        assert same(getattr(before.state, name), getattr(after.state, name))
    assert not same(before.state.lower_params, after.state.lower_params)
    assert (int(end.state.upper_steps), int(end.state.upper_skipped)) == (7, 1)
    line = read_lines(tmp_path / "run" / "log.jsonl")[1]
    assert line["upper_skipped"] == 1
    assert line["upper_loss"] is None  # a mean with it is not a number
    assert line["troubles"] == {"upper_loss_not_finite": 1}


def test_an_exploding_hypergradient_costs_the_step(tmp_path):
    end = run_toy(tmp_path / "run", "skip", upper={11: 1e9}, steps=13, every=1)
    before, after = stateat(tmp_path / "run", 11), stateat(tmp_path / "run", 12)
    assert same(before.state, after.state, but=("lower_steps",))
    assert end.seen.counts["hypergradient_exploded"] == 1


@pytest.mark.parametrize(("bad", "back"), [(7, 6), (4, 3), (1, 0)])
def test_rollback_returns_to_the_last_checkpoint_and_goes_on_with_the_data(tmp_path, bad, back):
    end = run_toy(tmp_path / "run", "rollback", lower={bad: NAN}, steps=bad + 1)
    assert int(end.state.lower_steps) == bad + 1
    expected = stateat(tmp_path / "run", back).state if back else toy()[1]
    assert same(expected, end.state, but=("lower_steps",))


@pytest.mark.parametrize("stopped_after", [4, 5, 7])
def test_a_run_with_rollback_is_resumed_exactly(tmp_path, stopped_after):
    bad = {5: NAN, 9: INF}
    whole = run_toy(tmp_path / "whole", "rollback", lower=bad, steps=12)
    assert whole.seen.counts == {"lower_loss_not_finite": 2}
    half = run_toy(tmp_path / "run", "rollback", lower=bad, steps=stopped_after)
    _, state = toy()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", every=3, keep=0, identity=TOY)
    # As a signal does: a checkpoint that was not due, which no rollback may return to.
    kept = checkpoints.load(checkpoints.save(half, due=False), state)
    end = run_toy(tmp_path / "run", "rollback", lower=bad, steps=12, start=kept)
    assert same(whole.state, end.state)
    assert torch.equal(whole.random.cpu, end.random.cpu)
    assert whole.seen == end.seen


def test_too_many_in_a_row_end_the_run(tmp_path):
    bad = dict.fromkeys(range(2, 30), NAN)
    with pytest.raises(NonFiniteError, match=f"step {1 + GIVE_UP}: lower_loss is nan. It is the "):
        run_toy(tmp_path / "run", "skip", lower=bad, steps=30)


def test_figures_that_are_not_finite_are_null_in_the_log():
    line = json.loads(Unlogged({"a": [1.0, INF], "b": [1.0, 2.0]}).line("x", 3, 0, {"lr": 0.5}))
    assert line == {"phase": "x", "step": 3, "a": None, "b": 1.5, "lr": 0.5}


def test_notes_are_logged_once_and_no_more_than_five():
    unlogged = Unlogged({})
    for note in ("a", "b", "a", "c", "d", "e", "f"):
        unlogged = unlogged.after(info()._replace(notes=(note,)))
    line = json.loads(unlogged.line("x", 7, 2, {}))
    assert (line["notes"], line["upper_skipped"]) == (["a", "b", "c", "d", "e"], 2)
