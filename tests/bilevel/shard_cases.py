"""Runs whose θ lies in shards on several ranks, or whole in one process.

``main``, which ``tests.rank_processes.fork_ranks`` calls, takes them as one of the ranks, and
leaves what it found in a folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from bilevel import (
    SGD,
    AdamW,
    BilevelSolver,
    Dot,
    Identity,
    OneStep,
    ResidentSolver,
    ReweightingProblem,
    RMSProp,
    Shards,
    WarmupCosine,
    functional,
    sharded,
    tree,
)
from weighting import DomainTable, InstanceNet, InstanceTable, Sigmoid

Batch = Mapping[str, Tensor]
ROWS, DOMAINS, TOKENS, WIDTH = 5000, 3, 4, 5
"""With 2 and with 3 ranks the last shards of 11 tokens and of a width of 5 are smaller; the head's,
of one row, leaves the others nothing."""


class Block(nn.Module):
    """A residual layer with a norm, which may be recomputed in the backward pass."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 7)
        self.narrow = nn.Linear(7, WIDTH, bias=False)
        self.recompute = recompute

    def forward(self, hidden: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            found: Tensor = checkpoint(self.mixed, hidden, use_reentrant=False)
            return found
        return self.mixed(hidden)

    def mixed(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.narrow(torch.tanh(self.wide(self.norm(hidden))))
        return out


class Model(nn.Module):
    """Tokens to a number; the last layer's embedding is tied, a scale is frozen."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList([Block(recompute), Block(recompute)])
        self.tied = nn.Linear(WIDTH, 11, bias=False)
        self.tied.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.full((4,), 0.3), requires_grad=False)
        self.head = nn.Linear(11, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(torch.tanh(self.tied(hidden))).squeeze(-1) * self.scale.sum()


@dataclass(frozen=True)
class Case:
    """A run, and what of the defaults it changes."""

    weighting: str = "table"
    method: OneStep = OneStep(Dot(), "upper-first")
    lower: Any = AdamW(0.02, weight_decay=0.01, max_norm=0.05)  # a clip that is active
    options: Mapping[str, Any] = field(default_factory=dict)
    accumulation: int = 1
    steps: int = 4
    spoiled: int | None = None  # the example of the second step whose loss is NaN
    bad_upper: bool = False  # the upper loss of the second step is infinite on the last rank
    recompute: bool = False
    whole_root: bool = True  # whether the outermost module stays whole between the passes


AVERAGED = OneStep(Dot(), "upper-first", direction_decay=0.5)
SCHEDULE = AdamW(
    {"head": WarmupCosine(0.03, 2, 20), "body": 0.01},
    group=lambda name: "head" if name.startswith("head") else "body",
    weight_decay=0.1,
    decay_mask=lambda name: "bias" not in name,
    max_norm=0.5,
)


def cases() -> dict[str, Case]:
    """All runs, by name."""
    found = {}
    for weighting in ("table", "net", "domain"):
        found[weighting] = Case(weighting)
        found[f"{weighting}, averaged"] = Case(weighting, AVERAGED, accumulation=2)
        found[f"{weighting}, schedule"] = Case(weighting, lower=SCHEDULE)
    return found | {
        "accumulation": Case(accumulation=3),
        "momentum": Case("net", lower=SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.05)),
        "rmsprop": Case("net", AVERAGED, lower=RMSProp(0.01, max_norm=0.4)),
        "windows": Case("net", options={"unroll_steps": 2, "upper_start": 1}, steps=5),
        "identity": Case("net", OneStep(Dot(), "upper-first", update_derivative=Identity())),
        "a loss that is NaN": Case("net", AVERAGED, spoiled=1),
        "an upper loss that is infinite": Case("net", AVERAGED, bad_upper=True),
        "recomputed": Case("net", recompute=True),
        "root in shards": Case("net", whole_root=False),
    }


def model_of(case: Case) -> Model:
    """The model before it is sharded, the same on all ranks."""
    torch.manual_seed(0)
    return Model(case.recompute).double()


def spread(case: Case, ranks: int) -> Model:
    """The model in shards."""
    model = model_of(case)
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=None if case.whole_root else True)
    return model


def problem_of(case: Case, model: Callable[..., Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The losses, and φ."""
    weightings: dict[str, Any] = {
        "table": InstanceTable(ROWS, bound=Sigmoid(2.0), normalise="none"),
        "net": InstanceNet(2, bound=Sigmoid(2.0), centre=False, normalise=False),
        "domain": DomainTable(DOMAINS),
    }
    weighting = weightings[case.weighting]
    generator = torch.Generator().manual_seed(2)
    phi = {
        name: leaf.double() + 0.1 * torch.randn(leaf.shape, generator=generator).double()
        for name, leaf in weighting.init(torch.Generator().manual_seed(1)).items()
    }

    def losses(theta: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = model(theta, batch["tokens"])
        found = (outputs - batch["target"][:, None]).square().mean(1) * batch["spoil"]
        return found, {"outputs": outputs}

    def weights(upper: Any, batch: Batch, features: Mapping[str, Tensor]) -> Tensor:
        outputs = features["outputs"]
        own = torch.stack([outputs, outputs.square()], -1)
        mask = torch.ones(outputs.shape, dtype=torch.bool)
        found: Tensor = weighting.batch_weights(
            upper, {**batch, "features": own, "feature_mask": mask}
        )
        return found

    def upper_loss(theta: Any, upper: Any, batch: Batch) -> Tensor:
        outputs = model(theta, batch["tokens"]).mean(1)
        direct = 1e-3 * sum(leaf.square().sum() for leaf in tree.leaves(upper))
        terms = (torch.tanh(outputs) - batch["target"]).square() * batch["spoil"]
        return terms.mean() + direct

    return ReweightingProblem(losses, weights, upper_loss), phi


def batch_of(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Examples."""

    def number(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (rows, *shape), generator=generator)

    return {
        "tokens": number(11, TOKENS),
        "target": torch.randn(rows, generator=generator, dtype=torch.float64),
        "spoil": torch.ones(rows, dtype=torch.float64),
        "index": number(ROWS),
        "domain": number(DOMAINS),
    }


def upper_size(batch: Batch) -> int:
    """Rows of a part of an upper batch."""
    return len(batch["target"])


ENDS = {1: [0, 7], 2: [0, 5, 7], 3: [0, 3, 4, 7]}
"""Where the unequal parts of an upper batch of 7 end."""


def taken(
    solver: Any,
    state: Any,
    case: Case,
    rank: int,
    ranks: int,
    micro_batches: int,
    first: int = 0,
    last: int | None = None,
) -> Any:
    """Take the steps of a run that ``ranks`` share, as one of them.

    Args:
        solver: Of this rank.
        state: Before the step ``first``.
        case: The run.
        rank: Which of the ranks this is.
        ranks: How many there are.
        micro_batches: Those of a step, of all ranks.
        first: Where to begin.
        last: Where to end; None: at the end of the run.

    Returns:
        The state, and the figures of the steps by name.
    """
    own = solver.accumulation
    generator = torch.Generator().manual_seed(3)
    figures: dict[str, list[Tensor]] = {}
    done, last = 0, last or case.steps
    while done < last:
        due = solver.next_steps(state, last - done)
        lower = []
        for step in range(due.lower):
            drawn = [batch_of(1, generator) for _ in range(micro_batches)]
            if case.spoiled is not None and done + step == 1:
                drawn[case.spoiled]["spoil"].fill_(float("nan"))
            lower.append(drawn[rank * own : (rank + 1) * own])
        upper = batch_of(7, generator)
        if case.bad_upper and done == 1:
            upper["spoil"][-1] = float("inf")
        whole, ends = upper, ENDS[ranks]
        upper = {name: rows[ends[rank] : ends[rank + 1]] for name, rows in upper.items()}
        done += due.lower
        if done <= first:  # drawn, but not taken
            continue
        state, infos = solver.advance(state, lower, upper if due.upper else None)
        for info in infos:
            for name in ("lower_loss", "lower_grad_norm", "losses", "weights", "upper_loss"):
                if (value := getattr(info, name)) is not None:
                    figures.setdefault(name, []).append(value.reshape(-1))
            # Evaluated between the steps, where a module might hold θ of before.
            with torch.no_grad():
                seen = solver.problem.upper_loss(state.lower_params, state.upper_params, whole)
            figures.setdefault("evaluated", []).append(seen.reshape(-1))
            assert not info.notes or case.spoiled is not None or case.bad_upper, info.notes
    return state, {name: torch.cat(rows) for name, rows in figures.items()}


def alone(case: Case, parts: int) -> dict[str, Tensor]:
    """What one process finds in the run of so many ranks, by the functional execution."""
    f = functional(model_of(case))
    problem, phi = problem_of(case, f)
    solver: Any = BilevelSolver(
        problem,
        case.lower,
        SGD(0.5),
        case.method,
        accumulation=parts * case.accumulation,
        **case.options,
    )
    state, figures = taken(
        solver, solver.init(f.params, phi), case, 0, 1, parts * case.accumulation
    )
    return {**tree.flatten(state), **figures}


def in_shards(case: Case, rank: int, ranks: int) -> tuple[Any, Any, dict[str, Tensor]]:
    """The sharded module, the state and the figures of a run, as one of the ranks."""
    f = sharded(spread(case, ranks))
    problem, phi = problem_of(case, f)
    if rank:  # init takes those of rank 0
        phi = tree.map(lambda leaf: leaf + rank, phi)
    solver: Any = ResidentSolver(
        problem,
        case.lower,
        SGD(0.5),
        case.method,
        accumulation=case.accumulation,
        collective=Shards(f, upper_size),
        **case.options,
    )
    micro_batches = ranks * case.accumulation
    state = solver.init(f.module_params, phi)
    state, figures = taken(solver, state, case, rank, ranks, micro_batches)
    return f, state, figures


def joined(store: str, rank: int, ranks: int) -> None:
    """Join the ranks of a test."""
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    # Of the model's output, a view, which nobody changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def main(folder: Path, store: str, rank: int, ranks: int) -> None:
    """Take every run as one of the ranks, and save what was found."""
    joined(store, rank, ranks)
    found = {}
    for name, case in cases().items():
        f, state, figures = in_shards(case, rank, ranks)
        f.module.reshard()  # an evaluation has left it whole
        own = dict(f.module.named_parameters())
        held = sum(leaf.numel() for leaf in tree.leaves(state.lower_params))
        found[name] = {
            "run": {**tree.flatten(f.gathered(state)), **figures},
            "held": held,
            "in the module": all(
                own[key].to_local().data_ptr() == leaf.data_ptr()
                for key, leaf in state.lower_params.items()
            ),
        }
    torch.save(found, folder / f"{ranks}-{rank}.pt")
    distributed.destroy_process_group()
