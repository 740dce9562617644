"""One evaluation of a contender outside the timing: its memory, arithmetic and error."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel import Refusal
from recipes.evidence.bench.contenders import GRADIENT, Contender, reference
from recipes.evidence.bench.measure import with_flops, with_peak

REFUSALS = (Refusal, RuntimeError, ValueError, NotImplementedError)


@dataclass
class Evaluated:
    """The results of one evaluation of a contender outside the timing."""

    contender: Contender
    peak: int | None = None
    flops: int | None = None
    hypergradient: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name, which is unique among all contenders."""
        one = self.contender
        return f"{one.route}, {one.steps}, {one.case.name}"


def evaluate(contender: Contender) -> Evaluated:
    """Run a contender once; an unsupported case or a lack of memory is recorded in the notes."""
    one = Evaluated(contender)
    try:
        if contender.process is not None:
            figures = contender.process()
            if figures is None:
                one.notes.append("out of memory")
                return one
            one.peak, one.flops = figures["peak"], figures["flops"]
            one.hypergradient = torch.tensor(figures["hypergradient"])
            return one
        if contender.steps == 1:
            contender.run()  # The first step measures whether the rules per example apply.
        (result, one.flops), one.peak = with_peak(lambda: with_flops(contender.run))
    except REFUSALS as error:
        one.notes.append(f"refused: {str(error).splitlines()[0]}")
        return one
    if contender.extract is not None:
        one.hypergradient = contender.extract(result).detach()
    if contender.reference == "darts" and isinstance(result, tuple):
        one.notes.append(f"left {result[1]:.0%} of the entries of θ changed")
    return one


def errors(
    evaluated: Sequence[Evaluated], reference_steps: int, log: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return distances to the contenders' references, and cosines with the exact hypergradient.

    The keys of both are the names of ``Evaluated``. For K steps the exact hypergradient is that
    through K steps.
    """
    known: dict[tuple[str, int, str], Tensor] = {}

    def look_up(name: str, one: Evaluated) -> Tensor:
        at, steps = one.contender.case, one.contender.steps
        key = ("lower-first" if name == "unrolled" and steps == 1 else name, steps, at.name)
        if key not in known:
            started = time.perf_counter()
            known[key] = reference(name, at, steps)
            log(f"reference {key} in {time.perf_counter() - started:.1f} s")
        return known[key]

    distances, cosines = {}, {}
    for one in evaluated:
        if one.hypergradient is None or one.contender.reference is None:
            continue
        if one.contender.steps > reference_steps:
            one.notes.append("not computed in float64")
            continue
        computed = one.hypergradient.double()
        wanted = look_up(one.contender.reference, one)
        distances[one.name] = float((computed - wanted).norm() / wanted.norm())
        if one.contender.reference == GRADIENT:
            continue
        exact = look_up("unrolled", one)
        cosines[one.name] = float(torch.cosine_similarity(computed, exact, dim=0))
    return distances, cosines
