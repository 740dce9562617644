"""The lower steps of a window: the loop in which θ moves.

Training, a window that is differentiated, and the second pass of a rollback go through
``take_steps``. A hypergradient takes no steps: it gives the loop a ``Recorder``, which is asked
before each lower pass what the pass should leave behind, and is shown each step after it was taken.
Small windows that are differentiated may take theirs through one graph instead, with the same bits
(``bilevel.hypergradients.one_graph``); ``bilevel.resident`` takes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves, gradients
from bilevel.autodiff.random_state import RandomState
from bilevel.collective import Alone, Collective
from bilevel.lower.guard import LOOKS, Guard
from bilevel.lower.lower_pass import LowerPass, lower_pass
from bilevel.lower.route import Route
from bilevel.optimizers.base import DifferentiableOptimizer, Hyperparameters, Optimizer
from bilevel.problem import Batch, Params, Problem
from bilevel.profiling import part
from bilevel.tree import Tree


class Point(NamedTuple):
    """Lower parameters and optimizer state before a step."""

    lower_params: Params
    optimizer_state: Any


@dataclass(frozen=True, eq=False)
class Window:
    """A window: where it starts, and all that determines its lower steps.

    Attributes:
        problem: The losses.
        optimizer: Takes the lower steps.
        start: θ and the optimizer's state before the first step.
        upper_params: φ, the same in all steps.
        batches: Per lower step its micro-batches.
        initial: φ -> θ, if that is what ``start`` comes from; None: θ does not depend on φ.
        hyperparameters: φ -> numbers of the optimizer that come from φ; None: none do.
        collective: The ranks that the batches are spread over.
        guard: Who decides what depends on values.
    """

    problem: Problem
    optimizer: DifferentiableOptimizer
    start: Point
    upper_params: Params
    batches: Sequence[Sequence[Batch]]
    initial: Callable[[Any], Params] | None = None
    hyperparameters: Callable[[Any], Hyperparameters] | None = None
    collective: Collective = Alone()
    guard: Guard = LOOKS

    def at(self, upper_params: Params) -> Window:
        """Return the same window at a φ, from which the start and the numbers may come.

        The state of an optimizer whose θ starts anew is a new one.
        """
        upper_params = tree.map(Tensor.detach, upper_params)
        optimizer, start = self.optimizer, self.start
        with torch.no_grad():
            if self.hyperparameters is not None:
                learnable: Any = optimizer
                optimizer = learnable.with_hyperparameters(self.hyperparameters(upper_params))
            if self.initial is not None:
                # A copy, since a function may return leaves of φ itself.
                params = tree.map(Tensor.clone, self.initial(upper_params))
                start = Point(params, optimizer.init(params))
        return replace(self, optimizer=optimizer, start=start, upper_params=upper_params)

    def numbers(self) -> Hyperparameters:
        """Return the numbers of the optimizer that come from φ, none if none do."""
        if self.hyperparameters is None:
            return {}
        with torch.no_grad():
            return self.hyperparameters(tree.map(Tensor.detach, self.upper_params))

    def pulled_back(self, start_bar: Tree, numbers_bar: Hyperparameters) -> Tree:
        """Return what φ owes to the start and to the numbers; None where it owes nothing.

        Args:
            start_bar: Cotangent of θ before the first step, None leaves being zero.
            numbers_bar: Cotangents of ``numbers``, or {}.

        Raises:
            ValueError: What ``initial`` or ``hyperparameters`` returns has no graph to φ.
        """
        upper_params = as_leaves(self.upper_params)
        outputs: list[Tensor] = []
        cotangents: list[Tensor] = []

        def add(value: Tensor, bar: Tensor) -> None:
            outputs.append(value)
            cotangents.append(bar.to(value))

        def check(field: str, values: Tree) -> None:
            if not any(leaf.requires_grad for leaf in tree.leaves(values)):
                raise ValueError(
                    f"{field}: nothing that it returns depends on φ by a graph (no_grad, detach, "
                    "other tensors?); leave it out, or compute it from the φ that it is given"
                )

        with torch.enable_grad():
            if self.initial is not None:
                tree.map(add, start := self.initial(upper_params), start_bar)
                check("initial", start)
            if self.hyperparameters is not None and numbers_bar:
                numbers = dict(self.hyperparameters(upper_params))
                check("hyperparameters", numbers)
                tree.map(add, numbers, dict(numbers_bar))
            return gradients(outputs, upper_params, cotangents)


class PassRequest(NamedTuple):
    """What a lower pass should leave behind beside the gradient; by default nothing.

    Attributes:
        upper_params: φ as autograd leaves, for weights with a graph to them; None: φ without one.
        differentiate: Whether a mixed product will be asked for.
        direction: μ of that product, if it is known before the pass.
        keep_graph: Whether a plain backward pass keeps its graph for a product, in place of
            another pass: half of the time where starting operations costs more than their
            arithmetic, for the memory of the activations until then (``is_small``).
    """

    upper_params: Params | None = None
    differentiate: bool = False
    direction: Tree | None = None
    keep_graph: bool = False


class Step(NamedTuple):
    """A lower step that was taken.

    Attributes:
        number: Its number in the window, from 0.
        before: θ and the optimizer's state before it.
        random: The random state from which its lower pass was run.
        passed: The lower pass, with its gradient.
    """

    number: int
    before: Point
    random: RandomState
    passed: LowerPass


class Recorder(Protocol):
    """What remembers the steps of a window while they are taken."""

    def before(self, number: int, point: Point, random: RandomState) -> PassRequest:
        """Return what the lower pass of step ``number``, from this point, should leave behind.

        The torch generators must be left as they are: see ``random_state.rewound_to``.
        """

    def after(self, step: Step) -> None:
        """Keep of the step what will be needed. Whatever is not kept is freed."""


class LowerSteps(NamedTuple):
    """Lower steps that were taken.

    Attributes:
        end: θ and the optimizer's state after the last.
        passes: The figures of each lower pass, in order (``LowerPass.summary``).
        skipped: Numbers of the steps whose gradient was not finite, at which the point stayed.
    """

    end: Point
    passes: tuple[LowerPass, ...]
    skipped: tuple[int, ...] = ()


def take_steps(window: Window, route: Route, recorder: Recorder | None = None) -> LowerSteps:
    """Take the lower steps of a window, one for each entry of its batches.

    The lower passes alone move the torch generators, and what a recorder asks for does not change
    the gradients: with or without it the steps are the same bit for bit. A step whose gradient has
    a norm that is not finite is left out: the point stays, and the recorder is not shown it.

    Args:
        window: Where to start, and on which batches.
        route: By which the lower passes are run.
        recorder: What remembers the steps; None: nothing does (plain training).

    Raises:
        Refusal: The route has no per-example rule for something the model does.
        ValueError: Losses or weights of a wrong shape, or micro-batches that do not suit the route.
    """
    plain = tree.map(Tensor.detach, window.upper_params)
    point, passes = window.start, []
    skipped: list[int] = []
    for index, micro_batches in enumerate(window.batches):
        random = random_state.capture(point.lower_params)
        request = PassRequest() if recorder is None else recorder.before(index, point, random)
        passed = lower_pass(
            window.problem,
            route,
            point.lower_params,
            plain if request.upper_params is None else request.upper_params,
            micro_batches,
            differentiate=request.differentiate,
            direction=request.direction,
            keep_graph=request.keep_graph,
            collective=window.collective,
            guard=window.guard,
        )
        del request  # with a direction that the pass has used
        following = advance(window.optimizer, point, passed.grads)
        passes.append(passed.summary())
        # After the update was launched: the wait for the norm on a device overlaps with it.
        if not window.guard.lower(passes[-1].grad_norm, passes[-1].loss_and_weights):
            following = point
            skipped.append(index)
        elif recorder is not None:
            recorder.after(Step(index, point, random, passed))
        point = following
        del passed, following  # not held while the next pass runs
    return LowerSteps(point, tuple(passes), tuple(skipped))


@part("lower update")
@torch.no_grad()
def advance(optimizer: Optimizer, point: Point, grads: Tree) -> Point:
    """Return the point after the step with these gradients."""
    return Point(*optimizer.update(grads, point.optimizer_state, point.lower_params))
