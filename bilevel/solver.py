"""The alternation of lower and upper steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.checks import refuse_processes
from bilevel.collective import Alone, Collective
from bilevel.hypergradients.base import (
    Hypergradient,
    HypergradientResult,
    exact_steps,
    spans_window,
    take_window,
)
from bilevel.hypergradients.one_step import OneStep
from bilevel.inputs import (
    check_method,
    check_micro_batches,
    check_optimizer,
    check_params,
    drawn_steps,
)
from bilevel.lower.guard import LOOKS, Guard
from bilevel.lower.lower_pass import LowerPass
from bilevel.lower.steps import LowerSteps, Point, Window
from bilevel.optimizers.base import (
    DifferentiableOptimizer,
    Hyperparameters,
    Optimizer,
    clip_scale,
)
from bilevel.problem import BatchT, BilevelProblem, Lower, ReweightingProblem, Upper
from bilevel.profiling import part
from bilevel.state import BilevelState, StepInfo, check_state

# For each lower step its micro-batches; or an iterator over the micro-batches of all steps.
LowerBatches: TypeAlias = Sequence[Sequence[BatchT] | Iterator[BatchT]] | Iterator[BatchT]


UNREAD: Any = ()
"""Stands for the batch of an upper step that does not look at it."""


class NextSteps(NamedTuple):
    """What comes next in a run: so many lower steps, and an upper step after them or not."""

    lower: int
    upper: bool


@dataclass(frozen=True)
class BilevelSolver(Generic[Lower, Upper, BatchT]):
    """Lower steps on θ and, between them, upper steps on φ along the hypergradient.

    ``window`` takes ``unroll_steps`` lower steps and then an upper step; ``step`` takes one lower
    step at a time and the upper step after the last of a window, for hypergradients that only look
    at that one.

    Args:
        problem: The losses.
        lower_optimizer: Takes the lower steps; differentiated through.
        upper_optimizer: Takes the upper steps.
        hypergradient: How dL_upper/dφ is computed.
        unroll_steps: Lower steps per upper step, a window. How many of them the hypergradient goes
            through is its own choice; ``OneStep`` goes through the last one.
        accumulation: Micro-batches per lower step.
        rollback: Look ahead: after an upper step, redo the lower steps of the window (``step``: the
            last one) from the old θ, with the same random numbers and the new φ.
        upper_start: Lower steps before the first window of which an upper step is part.
        initial: φ -> θ from which every window starts anew, with a new state of the lower
            optimizer; the hypergradient goes through it (MAML: ``lambda phi: phi``). None: θ goes
            on from window to window.
        hyperparameters: φ -> numbers of the lower optimizer by name, in place of those that it was
            made with: ``lambda phi: {"lr": phi["log_lr"].exp()}``, or one for each of its groups.
            ``SGD`` has lr, weight_decay and momentum, ``Adam`` and ``AdamW`` lr, weight_decay and
            betas, ``RMSProp`` lr, weight_decay and beta, the others lr and weight_decay. The
            hypergradient goes through them.
        collective: The ranks that take a step together, each on its part of the micro-batches
            (``accumulation`` is that of one rank) and of the upper batch: ``Replicas(...)``. With
            it ``StepInfo`` has the figures of all ranks, but aux and notes of this one.

    With no upper batches, or with the upper learning rate 0, the lower trajectory is bit for bit
    the same; with weights 1 it is that of plain training. A hypergradient with an entry that is
    infinite or NaN, or that of such an upper loss, is not used: φ, the upper optimizer and
    ``memory`` stay as they are, and ``BilevelState.upper_skipped`` counts it. A lower gradient
    whose norm is not finite is not used either: θ and the lower optimizer stay as they are,
    ``BilevelState.lower_skipped`` counts it, and no upper step follows in its window.

    Raises:
        ValueError: A count below its minimum, or a hypergradient that does not apply to the
            problem, the optimizer or the window.
    """

    problem: BilevelProblem[Lower, Upper, BatchT] | ReweightingProblem[Lower, Upper, BatchT]
    lower_optimizer: DifferentiableOptimizer
    upper_optimizer: Optimizer
    hypergradient: Hypergradient = OneStep()
    unroll_steps: int = 1
    accumulation: int = 1
    rollback: bool = False
    upper_start: int = 0
    initial: Callable[[Upper], Lower] | None = None
    hyperparameters: Callable[[Upper], Hyperparameters] | None = None
    collective: Collective = Alone()

    in_place: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.problem, BilevelProblem | ReweightingProblem):
            raise TypeError(
                "BilevelSolver: problem must be a BilevelProblem or a ReweightingProblem, found "
                f"{self.problem!r}"
            )
        check_optimizer("lower_optimizer", self.lower_optimizer)
        check_optimizer("upper_optimizer", self.upper_optimizer)
        check_method(self.hypergradient)
        for name, low in (("unroll_steps", 1), ("accumulation", 1), ("upper_start", 0)):
            if getattr(self, name) < low:
                raise ValueError(
                    f"BilevelSolver: {name} must be at least {low}, got {getattr(self, name)}"
                )
        self.hypergradient.check(self.problem, self.lower_optimizer, self.unroll_steps)
        name = type(self.hypergradient).__name__
        if self.collective.ranks > 1 and not getattr(self.hypergradient, "over_ranks", False):
            raise ValueError(
                f"BilevelSolver: {name} does not sum over ranks what it computes of its batches; "
                "choose OneStep(), Unrolled() or Implicit(), or run one process"
            )
        if getattr(self.collective, "in_place", False) and not self.in_place:
            raise ValueError(
                f"BilevelSolver: {type(self.collective).__name__} joins shards of a module that "
                "computes with its own parameters, whatever it is given; choose ResidentSolver, "
                "whose θ these are"
            )
        if self.hyperparameters is not None:
            if not hasattr(self.lower_optimizer, "hyperparameters_vjp"):
                raise ValueError(
                    f"BilevelSolver: {type(self.lower_optimizer).__name__} has no derivative with "
                    "respect to hyperparameters; choose a lower optimizer of bilevel.optimizers"
                )
            if not getattr(self.hypergradient, "through_hyperparameters", False):
                raise ValueError(
                    f"BilevelSolver: hyperparameters depend on φ, and {name} does not "
                    "differentiate through the lower optimizer; choose Unrolled(), or OneStep() in "
                    "order lower-first with update_derivative=Exact()"
                )
        if self.initial is not None:
            whole = exact_steps(self.hypergradient, self.unroll_steps) == self.unroll_steps
            if not whole or not getattr(self.hypergradient, "through_initial", False):
                raise ValueError(
                    f"BilevelSolver: initial depends on φ, and {name} does not differentiate "
                    "through a whole window; choose Unrolled()"
                )
            if self.upper_start:
                raise ValueError(
                    f"BilevelSolver: upper_start={self.upper_start} has no effect with initial, "
                    "from which every window starts anew; leave it 0"
                )

    def init(self, lower_params: Lower | None, upper_params: Upper) -> BilevelState[Lower, Upper]:
        """Return the state before the first step; it holds clones of the tensors given.

        With several ranks these are the tensors of rank 0, or each rank's shards.

        Args:
            lower_params: θ; None: ``initial`` has it.
            upper_params: φ.

        Raises:
            TypeError: A leaf is no tensor, or a module was given.
            ValueError: A parameter is not floating point, or there is no θ.
            RuntimeError: There are several processes, and no ``collective`` for them.
        """
        self._check_processes()
        check_params("upper_params", upper_params)
        if lower_params is None:
            if self.initial is None:
                raise ValueError("lower_params: expected θ, found None; only initial may stand in")
            lower_params = self.initial(upper_params)
        check_params("lower_params", lower_params)
        lower_params = self._adopted(lower_params)
        upper_params = tree.map(_owned, upper_params)
        with self.collective.together():
            lower_params = self.collective.adopt(lower_params)
            upper_params = self.collective.first(upper_params)
        return BilevelState(
            lower_params=lower_params,
            upper_params=upper_params,
            lower_optimizer=self.lower_optimizer.init(lower_params),
            upper_optimizer=self.upper_optimizer.init(upper_params),
            memory=self.hypergradient.init(self.lower_optimizer, lower_params, upper_params),
            lower_steps=torch.zeros((), dtype=torch.int64),
            upper_steps=torch.zeros((), dtype=torch.int64),
            upper_skipped=torch.zeros((), dtype=torch.int64),
            lower_skipped=torch.zeros((), dtype=torch.int64),
        )

    def _adopted(self, lower_params: Lower) -> Lower:
        """Return θ as the state holds it, apart from the tensors given."""
        return tree.map(_owned, lower_params)

    def _taken(
        self, window: Window, upper_batch: BatchT | None, memory: Any
    ) -> tuple[LowerSteps, HypergradientResult | None]:
        """Take the lower steps of a window, and differentiate them if there is an upper batch."""
        return take_window(window, self.hypergradient, upper_batch, memory)

    def next_steps(
        self, state: BilevelState[Lower, Upper], remaining: int | None = None
    ) -> NextSteps:
        """Return what comes next: how many lower steps, and whether an upper step after them.

        A window where its steps belong together, else one step. ``advance`` takes them::

            due = solver.next_steps(state)
            batches = [micro_batches_of_a_step() for _ in range(due.lower)]
            state, infos = solver.advance(state, batches, upper_batch() if due.upper else None)

        Args:
            state: From ``init`` or the last call.
            remaining: Lower steps that are left of the run. A window that does not fit into them is
                taken step by step, without an upper step. None: there is no end.
        """
        if not spans_window(self.hypergradient, self.unroll_steps):
            return NextSteps(1, self.wants_upper(state))
        fits = remaining is None or self.unroll_steps <= remaining
        whole = self.starts_window(state) and fits
        return NextSteps(self.unroll_steps if whole else 1, whole)

    def wants_upper(self, state: BilevelState[Lower, Upper]) -> bool:
        """Return whether the next step is one after which an upper step is due."""
        return self._place_in_window(state) == self.unroll_steps - 1

    def reads_upper_batch(self, state: BilevelState[Lower, Upper]) -> bool:
        """Return whether the next upper step looks at its batch; else ``UNREAD`` will do.

        False only with ``OneStep(upper_gradient_every=N)``, in the steps that an earlier upper
        gradient serves.
        """
        reads: Callable[[Any], bool] | None
        reads = getattr(self.hypergradient, "reads_upper_batch", None)
        return reads is None or reads(state.memory)

    def starts_window(self, state: BilevelState[Lower, Upper]) -> bool:
        """Return whether the next ``unroll_steps`` steps are a window with an upper step."""
        return self._place_in_window(state) == 0

    def _place_in_window(self, state: BilevelState[Lower, Upper]) -> int | None:
        """Return the steps since the window began; None before ``upper_start``."""
        check_state(state)
        since = int(state.lower_steps) - self.upper_start
        return since % self.unroll_steps if since >= 0 else None

    def step(
        self,
        state: BilevelState[Lower, Upper],
        lower_batches: Sequence[BatchT] | Iterator[BatchT],
        upper_batch: BatchT | None = None,
    ) -> tuple[BilevelState[Lower, Upper], StepInfo]:
        """Take a lower step and, if it is due and there is a batch for it, an upper step.

        Args:
            state: From ``init`` or the previous step; not changed.
            lower_batches: The micro-batches, ``accumulation`` of them; or an iterator over
                micro-batches, from which these are drawn.
            upper_batch: None: no upper step. Not looked at unless ``wants_upper``.

        Raises:
            ValueError: Another number of micro-batches, losses or weights of a wrong shape, or an
                upper batch for a hypergradient that goes through several steps.
            bilevel.Refusal: ``Ghost`` or ``PerExample`` has no rule for something the model does.
        """
        if upper_batch is not None and spans_window(self.hypergradient, self.unroll_steps):
            raise ValueError(
                f"BilevelSolver.step: {type(self.hypergradient).__name__} goes through all "
                f"unroll_steps={self.unroll_steps} lower steps of a window; call "
                "window(state, batches, upper_batch) with the batches of all of them"
            )
        due = upper_batch if self.wants_upper(state) else None
        state, infos = self.advance(state, [lower_batches], due)
        return state, infos[0]

    def window(
        self,
        state: BilevelState[Lower, Upper],
        batches: LowerBatches[BatchT],
        upper_batch: BatchT | None = None,
    ) -> tuple[BilevelState[Lower, Upper], tuple[StepInfo, ...]]:
        """Take the lower steps of a window and, given a batch for it, an upper step.

        Args:
            state: From ``init``, ``step`` or the previous window; not changed.
            batches: Per lower step its micro-batches, ``accumulation`` of them. ``unroll_steps``
                steps if there is an upper batch, else any number. Or an iterator over
                micro-batches, ``iter(loader)`` say, from which those of ``unroll_steps`` steps are
                drawn.
            upper_batch: None: no upper step. Not looked at before ``upper_start`` lower steps.

        Returns:
            The state, and a ``StepInfo`` per lower step; the last has the fields of the upper
            level.

        Raises:
            ValueError: Another number of steps or micro-batches, or losses or weights of a wrong
                shape.
            bilevel.Refusal: ``Ghost`` or ``PerExample`` has no rule for something the model does.
        """
        drawn = drawn_steps(batches, self.unroll_steps, self.accumulation)
        if self._place_in_window(state) is None:
            upper_batch = None
        if upper_batch is not None or not drawn:
            self._check_whole(drawn)
        return self.advance(state, drawn, upper_batch)

    def advance(
        self,
        state: BilevelState[Lower, Upper],
        batches: LowerBatches[BatchT],
        upper_batch: BatchT | None = None,
        *,
        guard: Guard = LOOKS,
    ) -> tuple[BilevelState[Lower, Upper], tuple[StepInfo, ...]]:
        """Take these lower steps and, given a batch for it, an upper step, due or not.

        What ``step`` and ``window`` come down to; see ``next_steps``.

        Args:
            state: From ``init`` or the last call; not changed.
            batches: Per lower step its micro-batches, ``accumulation`` of them.
            upper_batch: None: no upper step.
            guard: Who decides what depends on values. ``Late(...)``: not the host, and what was
                not usual is for the caller to undo (``bilevel.lower.guard.kept``).

        Returns:
            The state, and a ``StepInfo`` per lower step; the last has the fields of the upper
            level.

        Raises:
            ValueError: Another number of micro-batches, or losses or weights of a wrong shape.
            bilevel.Refusal: ``Ghost`` or ``PerExample`` has no rule for something the model does.
        """
        with self.collective.together():
            return self._advance(state, batches, upper_batch, guard)

    def _advance(
        self,
        state: BilevelState[Lower, Upper],
        batches: LowerBatches[BatchT],
        upper_batch: BatchT | None,
        guard: Guard,
    ) -> tuple[BilevelState[Lower, Upper], tuple[StepInfo, ...]]:
        window = replace(self.window_at(state, batches), guard=guard)
        random = random_state.capture(state.lower_params) if self.rollback else None
        taken, upper = self._taken(window, upper_batch, state.memory)
        new = state
        notes: tuple[str, ...] = ()
        if upper is not None:
            new, notes = self._upper_step(state, upper, guard)
            if random is not None and new.upper_steps > state.upper_steps:
                random_state.restore(random)
                taken, _ = take_window(window.at(new.upper_params), self.hypergradient)
        elif upper_batch is not None:
            new, notes = _without_upper_step(state)
        return _moved(new, taken, len(window.batches)), self._infos(taken, upper, notes, guard)

    def window_at(self, state: BilevelState[Lower, Upper], batches: LowerBatches[BatchT]) -> Window:
        """Return the lower steps that ``advance`` would take from this state, before they are.

        Args:
            state: From ``init`` or the last call.
            batches: Per lower step its micro-batches, ``accumulation`` of them.

        Raises:
            RuntimeError: There are several processes, and no ``collective`` for them.
            TypeError: No list of lists of micro-batches.
            ValueError: Another number of micro-batches.
        """
        self._check_processes()
        check_state(state)
        drawn = drawn_steps(batches, self.unroll_steps, self.accumulation)
        for lower_batches in drawn:
            check_micro_batches("lower_batches", lower_batches, self.accumulation)
        return Window(
            self.problem,
            self.lower_optimizer,
            Point(state.lower_params, state.lower_optimizer),
            state.upper_params,
            drawn,
            self.initial if self._place_in_window(state) == 0 else None,
            self.hyperparameters,
            self.collective,
        ).at(state.upper_params)

    def meta_batch(
        self,
        state: BilevelState[Lower, Upper],
        tasks: Sequence[tuple[LowerBatches[BatchT], BatchT]],
    ) -> tuple[BilevelState[Lower, Upper], tuple[tuple[StepInfo, ...], ...]]:
        """Take a window on each of several tasks, and an upper step on the mean hypergradient.

        Each task starts from ``initial``, at the same φ. One that is not finite makes the mean so,
        and the upper step is skipped.

        Args:
            state: From ``init`` or the last call; not changed.
            tasks: For each the micro-batches of ``unroll_steps`` lower steps, and the batch of its
                upper loss.

        Returns:
            The state, with θ of the last task, and for each task a ``StepInfo`` per lower step.

        Raises:
            ValueError: There is no ``initial``, ``rollback`` is on, there are no tasks, or one has
                another number of steps or micro-batches; or there are several ranks.
        """
        if self.collective.ranks > 1:
            raise ValueError(
                f"meta_batch: expected one process, found {self.collective.ranks} ranks; call "
                "window for each task"
            )
        if self.initial is None or self.rollback or not tasks:
            raise ValueError(
                "meta_batch: expected a solver with initial (φ -> θ, from which every task starts) "
                "and without rollback, and at least one task; found "
                f"initial={self.initial}, rollback={self.rollback} and {len(tasks)} tasks"
            )
        new, found = state, []
        for given, upper_batch in tasks:
            batches = drawn_steps(given, self.unroll_steps, self.accumulation)
            self._check_whole(batches)
            window = self.window_at(state, batches)
            taken, upper = take_window(window, self.hypergradient, upper_batch, state.memory)
            new = _moved(new, taken, len(batches))
            found.append((taken, upper))
        results = [result for _, result in found if result is not None]
        if len(results) < len(found):
            new, notes = _without_upper_step(new)
        else:
            with torch.no_grad():
                total = results[0].hypergradient
                for result in results[1:]:
                    total = tree.add(total, result.hypergradient)
                losses = [loss for result in results if (loss := result.upper_loss) is not None]
                mean = results[-1]._replace(
                    hypergradient=tree.scale(1.0 / len(found), total),
                    upper_loss=torch.stack(losses).mean() if losses else None,
                )
            new, notes = self._upper_step(new, mean)
        return new, tuple(self._infos(taken, upper, notes) for taken, upper in found)

    def _check_processes(self) -> None:
        if isinstance(self.collective, Alone):
            refuse_processes()

    def _check_whole(self, batches: Sequence[Sequence[BatchT]]) -> None:
        if len(batches) != self.unroll_steps:
            raise ValueError(
                f"batches: expected the micro-batches of unroll_steps={self.unroll_steps} lower "
                f"steps, found {len(batches)}"
            )

    @part("upper step")
    def _upper_step(
        self,
        state: BilevelState[Lower, Upper],
        result: HypergradientResult,
        guard: Guard = LOOKS,
    ) -> tuple[BilevelState[Lower, Upper], tuple[str, ...]]:
        """Return the state with the upper step taken, or skipped if it is not finite, and notes."""
        found = result.hypergradient
        norm = tree.norm(found)
        loss = norm.new_zeros(()) if result.upper_loss is None else result.upper_loss.detach()
        guard.upper(norm, loss)
        size, upper_loss = 1.0, 0.0
        if guard.usual is None:
            # Read together: a device is waited for once.
            figures = norm.double(), loss.to(norm.device, torch.float64)
            size, upper_loss = torch.stack(figures).tolist()
        # Otherwise the squares of finite entries may have no finite sum.
        finite = math.isfinite(size) or bool(tree.allfinite(found))
        if not (finite and math.isfinite(upper_loss)):
            skipped = state._replace(upper_skipped=state.upper_skipped + 1)
            return skipped, (_LOSS_NOT_FINITE if finite else _NOT_FINITE,)
        with torch.no_grad():
            upper_params, upper_optimizer = self.upper_optimizer.update(
                found, state.upper_optimizer, state.upper_params
            )
        taken = state._replace(
            upper_params=upper_params,
            upper_optimizer=upper_optimizer,
            memory=result.memory,
            upper_steps=state.upper_steps + 1,
        )
        count = len(tree.leaves(state.upper_params))
        if count and not size:
            return taken, (ZERO if tree.leaves(found) else _NO_INFLUENCE,)
        missing = tree.missing(found, state.upper_params)
        if not missing:
            return taken, ()
        return taken, (_NO_INFLUENCE_OF_SOME.format(len(missing), count, missing[0]),)

    @torch.no_grad()
    def _infos(
        self,
        taken: LowerSteps,
        upper: HypergradientResult | None,
        notes: tuple[str, ...],
        guard: Guard = LOOKS,
    ) -> tuple[StepInfo, ...]:
        """Return what is known of the steps; of the upper step with the last of them."""
        norms = [passed.grad_norm for passed in taken.passes]
        clipped = _clipped(self.lower_optimizer, norms)
        infos = [
            _lower_info(passed, clipped[index], index in taken.skipped, guard)
            for index, passed in enumerate(taken.passes)
        ]
        last = infos[-1]
        if upper is not None:
            infos[-1] = self._with_upper(last, upper, notes)
        elif notes:
            infos[-1] = last._replace(notes=(*last.notes, *notes))
        return tuple(infos)

    def _with_upper(
        self, info: StepInfo, result: HypergradientResult, notes: tuple[str, ...]
    ) -> StepInfo:
        norm = tree.norm(result.hypergradient)
        return info._replace(
            upper_loss=result.upper_loss,
            hypergradient_norm=norm,
            upper_clipped=_clipped(self.upper_optimizer, [norm])[0],
            notes=tuple(dict.fromkeys((*info.notes, *result.notes, *notes))),
            upper_aux=result.upper_aux,
            figures=result.figures,
        )


def _moved(
    state: BilevelState[Lower, Upper], taken: LowerSteps, count: int
) -> BilevelState[Lower, Upper]:
    """Return the state after lower steps."""
    return state._replace(
        lower_params=cast("Lower", taken.end.lower_params),  # steps keep the structure
        lower_optimizer=taken.end.optimizer_state,
        lower_steps=state.lower_steps + count,
        lower_skipped=state.lower_skipped + len(taken.skipped),
    )


def _without_upper_step(
    state: BilevelState[Lower, Upper],
) -> tuple[BilevelState[Lower, Upper], tuple[str, ...]]:
    """Return the state and the note where a lower step of the window was left out."""
    return state._replace(upper_skipped=state.upper_skipped + 1), (_NO_UPPER_STEP,)


_STEP_SKIPPED = "the lower gradient was not finite: θ and its optimizer were left as they are"
_LOWER_LOSS_NOT_FINITE = (
    "the lower loss was not finite, but its gradient was, and the step was taken: does an example "
    "have no part in it (torch.where), or does its gradient miss a term?"
)
_NO_UPPER_STEP = "no upper step: a lower step of its window was left out"
_NOT_FINITE = "the hypergradient was not finite: φ and its optimizer were left as they are"
_LOSS_NOT_FINITE = (
    "the upper loss was not finite (an empty upper batch?): φ and its optimizer were left as they "
    "are"
)
ZERO = (
    "the hypergradient is exactly 0: here the upper loss does not change with the upper parameters"
)
_NO_INFLUENCE = (
    "the upper parameters have no influence on the upper loss: the losses or weights have no graph "
    "to them (no_grad, detach, other tensors), or the upper loss has none to the lower parameters"
)
_NO_INFLUENCE_OF_SOME = (
    "the upper loss does not depend on {} of the {} upper parameters ({!r}, ...), which stay as "
    "they are: not used, detached, or computed under no_grad"
)


def _owned(leaf: Tensor) -> Tensor:
    return leaf.detach().clone()


def _lower_info(passed: LowerPass, clipped: Tensor, skipped: bool, guard: Guard) -> StepInfo:
    figures, notes = passed.figures(), passed.remarks
    if skipped:
        notes = (*notes, _STEP_SKIPPED)
    elif guard.usual is None and figures.loss.is_cpu and not math.isfinite(figures.loss):
        # On a device that would be one more wait.
        notes = (*notes, _LOWER_LOSS_NOT_FINITE)
    return StepInfo(
        lower_loss=figures.loss,
        lower_grad_norm=passed.grad_norm,
        lower_clipped=clipped,
        losses=figures.losses,
        weights=figures.weights,
        upper_loss=None,
        hypergradient_norm=None,
        upper_clipped=None,
        notes=notes,
        lower_aux=tuple(micro.aux for micro in passed.micro_batches),
    )


def _clipped(optimizer: Optimizer, norms: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return for each gradient norm whether the optimizer clipped the gradient."""
    max_norm = getattr(optimizer, "max_norm", None)
    if max_norm is None:
        return [torch.zeros((), dtype=torch.bool, device=norms[0].device)] * len(norms)
    return [clip_scale(norm, max_norm) < 1.0 for norm in norms]
