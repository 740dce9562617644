"""The model in a precision, back at its start, and the contenders on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import CentralDifference, Dot, Ghost, Identity, Jvp, OneStep, tree
from prm.inputs.collate import Batch
from prm.models.model import split_parameters
from recipes.evidence.bench.race import contenders
from recipes.evidence.bench.race.model import Race, Shape, make_race
from recipes.evidence.bench.race.original import Original
from recipes.evidence.gpu import case as names
from recipes.evidence.gpu.case import Case

Iteration = Callable[[Batch, Batch], Tensor | None]

_METHODS = {
    names.DOT: OneStep(Dot()),
    names.DOT_UPPER: OneStep(Dot(), "upper-first"),
    names.DOT_IDENTITY: OneStep(Dot(), update_derivative=Identity()),
    names.GHOST: OneStep(Ghost(), "upper-first"),
    names.JVP: OneStep(Jvp(), "upper-first"),
    names.DIFFERENCE: OneStep(CentralDifference(), "upper-first"),
}
_THETA = {names.AUTOCAST: torch.float32, names.FULL_PRECISION: torch.float32}


@dataclass(frozen=True)
class Start:
    """A random model whose parameters every precision represents, and a copy of them.

    Attributes:
        race: The model on its device, without parameters and moments of its own.
        values: The parameters by name, bfloat16, in the memory of the host; pinned for a GPU.
    """

    race: Race
    values: dict[str, Tensor]


def start(shape: Shape, device: torch.device | str) -> Start:
    """Draw a model in float32, and round its parameters to bfloat16."""
    race = make_race(shape, torch.float32, device)
    values = {name: leaf.bfloat16().cpu() for name, leaf in race.params.items()}
    if torch.device(device).type == "cuda":  # Every case begins with a copy of them.
        values = {name: value.pin_memory() for name, value in values.items()}
    # They would be copies beside those of a case.
    state = race.state._replace(first_moment=None, second_moment=None)
    return Start(replace(race, params={}, state=state), values)


@torch.no_grad()
def race_at(begun: Start, one: Case) -> Race:
    """Return the race of a case, with θ at its start and cold moments.

    It has the memory of one model: that of an earlier case is no longer its own.
    """
    race, dtype = begun.race, _THETA.get(one.precision, torch.bfloat16)
    prm = race.objective.prm
    own = dict(prm.model.named_parameters())
    for name, value in begun.values.items():
        if own[name].dtype != dtype:
            own[name].data = own[name].to(dtype)
        own[name].copy_(value)
    params, _ = split_parameters(prm.model)
    autocast = torch.bfloat16 if one.precision == names.AUTOCAST else None
    return replace(
        race,
        shape=replace(race.shape, tiles=one.tiles, steps=one.positions),
        objective=replace(race.objective, prm=replace(prm, autocast=autocast)),
        params=params,
        state=race.state._replace(
            steps=torch.zeros_like(race.state.steps),
            first_moment=tree.zeros_like(params),
            second_moment=tree.zeros_like(params),
        ),
    )


def iteration(race: Race, contender: str, lower: Batch, upper: Batch) -> Callable[[], Any]:
    """Return an iteration of a contender on two batches; it returns the hypergradient, if any."""
    if contender == names.FLOOR:
        return contenders.floor(race, lower, upper)
    if contender == names.PASSES:
        return passes(race, lower, upper)
    taken = differentiating(race, contender)
    return lambda: taken(lower, upper)


def differentiating(race: Race, contender: str) -> Iteration:
    """Return an iteration of a contender that has a hypergradient, on any two batches."""
    if contender == names.ORIGINAL:
        return Original(race).iteration
    return contenders.Resident(race, _METHODS[contender]).iteration


def passes(race: Race, lower: Batch, upper: Batch) -> Callable[[], None]:
    """Return both plain gradients without an update: the launches of the model itself."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in race.params.items()}
    objective, wanted = race.objective, list(leaves.values())

    def run() -> None:
        torch.autograd.grad(objective.per_example_loss(leaves, lower)[0].mean(), wanted)
        torch.autograd.grad(objective.upper_loss(leaves, race.weights, upper), wanted)

    return run
