"""The measured computations: one ``Contender`` per row of the table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel import (
    BilevelSolver,
    CentralDifference,
    ConjugateGradient,
    Dot,
    Ghost,
    Hypergradient,
    Identity,
    Implicit,
    Jvp,
    OneStep,
    Penalty,
    PerExample,
    Reverse,
    StationarityWarning,
    Unrolled,
    tree,
)
from recipes.evidence.bench import memory_cap, peers
from recipes.evidence.bench.case import Batch, Case, plain_step, plain_upper_gradient

ROUTES: dict[str, OneStep] = {
    "dot, lower-first": OneStep(Dot()),
    "dot, upper-first": OneStep(Dot(), "upper-first"),
    "ghost, upper-first": OneStep(Ghost(), "upper-first"),
    "per-example, lower-first": OneStep(PerExample()),
    "jvp, lower-first": OneStep(Jvp()),
    "reverse, lower-first": OneStep(Reverse()),
    "central difference, lower-first": OneStep(CentralDifference()),
}
BETTY = OneStep(CentralDifference(radius=0.01), update_derivative=Identity())
SQRT_UP_TO = 16  # Lower steps; two windows show the growth of its memory.
FLOOR = "floor: lower step + upper gradient"
SINGLES = "floor, one example per micro-batch"
LOWER = "lower step"
FORWARD = "forward"
GRADIENT = "gradient"
FORWARD_OVER_REVERSE = "unrolled, forward over reverse"
TORCHOPT = "TorchOpt, double backward"


@dataclass(frozen=True)
class Contender:
    """One way to compute ``steps`` lower steps and one upper gradient.

    Attributes:
        route: The name of the row.
        case: The case, at which every iteration starts.
        run: The function that runs one iteration.
        extract: The function from the result of ``run`` to the hypergradient [instances] or, for
            the reference "gradient", the gradient. None means that there is nothing to compare.
        steps: The number of lower steps.
        reference: The name of the exact result for ``extract``. None means that there is none.
        floor: The contender with which its first step is compared.
        process: The function that runs the iteration in a process of its own. It returns
            {hypergradient, flops, peak}, or None if it exceeded its memory.
        work: The approximate cost in lower steps, if it differs from ``steps``.
    """

    route: str
    case: Case
    run: Callable[[], Any]
    extract: Callable[[Any], Tensor] | None = None
    steps: int = 1
    reference: str | None = None
    floor: str = FLOOR
    process: Callable[[], dict[str, Any] | None] | None = None
    work: int = 1

    @property
    def every(self) -> int:
        """The interval between its rounds of the timing, K^¾ for K steps."""
        power: float = max(self.steps, self.work) ** 0.75
        return round(power)


class Shown:
    """An upper optimizer that does not change φ and whose state is the last hypergradient."""

    def init(self, params: Any) -> Any:
        """Return zeros."""
        return tree.zeros_like(params)

    def update(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        """Return φ and the hypergradient."""
        return params, grads


def long_contenders(case: Case) -> Iterator[Contender]:
    """Yield the floors and the exact routes, for sequences of realistic length."""
    yield from _floors(case)
    for route, method in ROUTES.items():
        if not isinstance(method.route, Reverse | CentralDifference):
            yield _ours(route, case, method, reference=method.order)


def contenders(case: Case, windows: Sequence[int], cap: int) -> Iterator[Contender]:
    """Yield every row for one precision; unrolls and reference rows only for float32."""
    yield from _floors(case)
    if case.dtype == torch.float32:
        yield Contender("floor, torch.optim.AdamW in place", case, peers.torch_floor(case))
    for route, method in ROUTES.items():
        yield _ours(route, case, method, reference=method.order)
    yield _ours("Betty's convention: radius 0.01, identity", case, BETTY, reference="identity")
    yield Contender(
        "Betty's convention in place, by hand",
        case,
        partial(peers.darts_in_place, case),
        lambda result: result[0],
        reference="darts",
    )
    if case.dtype != torch.float32:
        return
    betty = peers.betty_engine(case)
    if betty is not None:
        yield Contender("Betty 0.2.1, darts", case, betty, lambda h: h, reference="darts")
    for steps in windows:
        yield _ours("unrolled", case, Unrolled(), steps, reference="unrolled")
        if steps > 1:  # With one step it is the same.
            forward = Unrolled(product=Jvp())
            yield _ours(FORWARD_OVER_REVERSE, case, forward, steps, reference="unrolled")
        if 1 < steps <= SQRT_UP_TO:
            fewer = Unrolled(replay="sqrt")
            yield _ours("unrolled, replay sqrt", case, fewer, steps, reference="unrolled")
        if steps == 4:  # Once only, since a CPU has no other memory.
            hosted = Unrolled(store="host")
            yield _ours("unrolled, store host", case, hosted, steps, reference="unrolled")
        yield Contender(
            TORCHOPT,
            case,
            partial(peers.torchopt_unroll, case, steps),
            lambda result: result,
            steps,
            "unrolled",
            process=partial(memory_cap.measure_torchopt, case.sizes, len(case.batches), steps, cap),
        )
    plain = replace(case, optimizer=replace(case.optimizer, weight_decay=0.0))
    implicit = Implicit(ConjugateGradient(iterations=5))
    yield replace(_ours("implicit, 5 iterations of CG", plain, implicit), work=4)
    yield _ours("penalty", case, Penalty(10.0))


def _floors(case: Case) -> Iterator[Contender]:
    floor = partial(_plain, case)
    # The hypergradients depend on its gradient and so share its error.
    yield Contender(FLOOR, case, partial(floor, case.batches[:1]), _flat, reference=GRADIENT)
    singles = case.singles(case.batches[0])
    yield Contender(SINGLES, case, partial(floor, singles), floor=SINGLES)


def _plain(case: Case, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Take a lower step, and return the upper gradient after it."""
    lower, _ = plain_step(case, case.lower, case.state, micro_batches)
    return plain_upper_gradient(case, lower)


def _flat(leaves: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in leaves.values()])


def _ours(
    route: str, case: Case, method: Hypergradient, steps: int = 1, reference: str | None = None
) -> Contender:
    """Return a contender that runs a window of ``BilevelSolver``, as a training loop does."""
    single = isinstance(method, OneStep) and isinstance(method.route, Dot)
    windows = [[batch] for batch in case.batches[:steps]]
    if single:
        windows = [case.singles(batch) for batch in case.batches[:steps]]
    solver = BilevelSolver(
        case.problem,
        case.optimizer,
        Shown(),
        method,
        unroll_steps=steps,
        accumulation=len(windows[0]),
    )
    state = solver.init(case.lower, case.upper)._replace(lower_optimizer=case.state)

    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StationarityWarning)
            return solver.window(state, windows, case.upper_batch)

    return Contender(
        route,
        case,
        run,
        lambda result: result[0].upper_optimizer["raw"],
        steps,
        reference,
        SINGLES if single else FLOOR,
    )


def baselines(case: Case) -> dict[str, Callable[[], Any]]:
    """Return the other units of cost: a forward pass, and a lower step alone."""

    def forward() -> None:
        with torch.no_grad():
            case.problem.lower_loss(case.lower, case.upper, case.batches[0])

    return {
        FORWARD: forward,
        LOWER: partial(plain_step, case, case.lower, case.state, case.batches[:1]),
    }


def reference(name: str, case: Case, steps: int) -> Tensor:
    """Return the exact result for a contender at this case, in float64, [instances].

    The names "lower-first", "upper-first" and "identity" mean ``OneStep``, and "unrolled" means
    ``Unrolled``, which the tests compare with TorchOpt's double backward; both use ``Reverse``.
    "darts" is ``peers.darts_limit``. "gradient" is not a hypergradient but the gradient of the
    upper loss after a lower step, [parameters].
    """
    case = case.cast(torch.float64)
    if name == GRADIENT:
        return _flat(_plain(case, case.batches[:1]))
    if name == "darts":
        return peers.darts_limit(case)
    if name == "unrolled" and steps > 1:
        method: Hypergradient = Unrolled(product=Reverse())
    elif name == "identity":
        method = replace(BETTY, route=Reverse())
    else:
        method = OneStep(Reverse(), "upper-first" if name == "upper-first" else "lower-first")
    contender = _ours(name, case, method, steps)
    assert contender.extract is not None
    return contender.extract(contender.run())
