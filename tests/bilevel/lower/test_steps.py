"""The loop that takes lower steps, and what it shows to a recorder."""

from __future__ import annotations

import gc
import weakref

import torch

from bilevel import AdamW, Jvp, PassRequest, Point, Window, tree
from bilevel.autodiff.gradient import as_leaves
from bilevel.autodiff.random_state import capture
from bilevel.lower.steps import take_steps
from tests.bilevel.comparing import relative, same_bits
from tests.bilevel.variants import pick
from tests.bilevel.zoo import build
from tests.oracles import lower_gradient

ADAMW = AdamW(0.05, eps=1e-3, weight_decay=0.1, max_norm=0.5)


class Everything:
    """Asks for differentiable weights in the last step, and keeps all that it is shown."""

    def __init__(self, window):
        self.window, self.asked, self.steps = window, [], []
        self.leaves = as_leaves(window.upper_params)

    def before(self, number, point, random):
        self.asked.append((number, point, random))
        last = number == len(self.window.batches) - 1
        return PassRequest(self.leaves, differentiate=True) if last else PassRequest()

    def after(self, step):
        self.steps.append(step)


def make_window(name="dropout", steps=3):
    case = build(name)
    rows = [[0, 1, 2, 3, 4], [4, 2, 0], [1, 3]]
    batches = [[pick(case.batch, rows[step % 3])] for step in range(steps)]
    start = Point(case.params, ADAMW.init(case.params))
    return Window(case.problem, ADAMW, start, case.upper_params, batches)


def test_the_steps_are_those_of_a_loop_by_hand():
    window = make_window()
    torch.manual_seed(5)
    taken = take_steps(window, Jvp())
    after = torch.get_rng_state()
    torch.manual_seed(5)
    params, state = window.start
    for (batch,), passed in zip(window.batches, taken.passes, strict=True):
        grads = lower_gradient(window.problem, params, window.upper_params, batch)
        torch.testing.assert_close(passed.grad_norm, tree.norm(grads), rtol=1e-12, atol=0)
        with torch.no_grad():
            params, state = ADAMW.update(grads, state, params)
    assert torch.equal(torch.get_rng_state(), after)
    assert relative(taken.end.lower_params, params) <= 1e-12
    assert int(taken.end.optimizer_state.steps) == 3


def test_a_recorder_sees_every_step_and_changes_none():
    window = make_window()
    torch.manual_seed(5)
    plain = take_steps(window, Jvp())
    after = torch.get_rng_state()
    torch.manual_seed(5)
    recorder = Everything(window)
    recorded = take_steps(window, Jvp(), recorder)
    assert same_bits(recorded.end, plain.end)
    assert torch.equal(torch.get_rng_state(), after)
    assert [number for number, _, _ in recorder.asked] == [0, 1, 2]
    assert [step.number for step in recorder.steps] == [0, 1, 2]
    points = [step.before for step in recorder.steps]
    assert points[0] is window.start
    for step, (_, point, random), following in zip(
        recorder.steps, recorder.asked, [*points[1:], recorded.end], strict=True
    ):
        assert step.before is point
        assert step.random is random
        with torch.no_grad():
            moved = ADAMW.update(step.passed.grads, point.optimizer_state, point.lower_params)
        assert same_bits(Point(*moved), following)
    weights = [step.passed.micro_batches[0].weights for step in recorder.steps]
    assert [leaf.requires_grad for leaf in weights] == [False, False, True]
    for summary, step in zip(recorded.passes, recorder.steps, strict=True):
        assert summary.grads is None
        assert summary.micro_batches[0].batch is None
        assert float(summary.grad_norm) == float(tree.norm(step.passed.grads))


def test_the_random_state_of_a_step_is_that_from_which_it_was_run():
    window = make_window(steps=2)
    torch.manual_seed(5)
    recorder = Everything(window)
    take_steps(window, Jvp(), recorder)
    for step, (batch,) in zip(recorder.steps, window.batches, strict=True):
        grads = lower_gradient(
            window.problem, step.before.lower_params, window.upper_params, batch, step.random.cpu
        )
        assert relative(step.passed.grads, grads) <= 1e-12
    assert not torch.equal(recorder.steps[0].random.cpu, recorder.steps[1].random.cpu)
    assert torch.equal(recorder.steps[0].random.cpu, recorder.asked[0][2].cpu)
    assert not torch.equal(capture(window.start.lower_params).cpu, recorder.steps[1].random.cpu)


def test_what_is_not_kept_is_freed_before_the_next_pass():
    window = make_window("mlp")

    class Forgetful:
        gradient = point = None

        def before(self, number, point, random):
            gc.collect()
            if number:
                assert self.gradient() is None
            if number > 1:
                assert self.point() is None  # the first belongs to the window
            return PassRequest()

        def after(self, step):
            self.gradient = weakref.ref(step.passed.grads["gain"])
            self.point = weakref.ref(step.before.lower_params["gain"])

    take_steps(window, Jvp(), Forgetful())
