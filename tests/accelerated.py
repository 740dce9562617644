"""Commands on the pretend accelerator, in a process of their own: torch keeps what is registered.

``python -m tests.accelerated OUT DIRECTORY SCENARIO ...`` runs each scenario and writes what was
noted, as JSON: ``{scenario: {"mix-ups": [...], "waits": {...}, "error": null or text}}``. The waits
are those of one step that is not logged, by place. ``losses`` are those that a training run logs.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bilevel import tree
from prm.losses import pair_loss
from tests import accelerator, faked
from tests.launches import Launches
from tests.tiny_task import Task, make_task
from weighting.normalise import batch_mean_one

STEP, STEPS = 6, 8
"""Number of the step whose waits are noted, and of all; counted from 0, lines are written at odd
ones. Before that a run looks at the first step, and at two from where its weights leave 1 on."""

MANY = 100
"""Leaves whose norm a device takes together."""

LAUNCHING = {"dot": 1, "dot, upper-first": 1, "ghost": 8, "floor": 1}
"""Contenders whose kernels are counted, and the examples of an iteration."""

SMALLER = 1024
"""How many times as many entries the real model has as the one whose kernels are counted."""

SHORT = 12
"""Tokens from which a text counts as long there: more than label positions, fewer than a tile."""

TRAININGS: dict[str, dict[str, Any]] = {
    "none": {"weighting": "none"},
    "meta": {"weighting": "none", "lower_data": "meta"},
    "pairs": {"loss_target": "pairs", "weighting": "table", "bound": "clip"},
    "net": {"weighting": "net", "features": ("p_label", "length", "domain")},
    "table": {"weighting": "table", "bound": "clip", "save_every": 4},
    "lazy": {"weighting": "table", "bound": "clip", "upper_optimizer": "lazy-adam"},
    "domain": {"weighting": "domain", "bound": "softplus"},
    "dot": {
        **{"weighting": "table", "bound": "clip", "normalise": "table"},
        **{"route": "dot", "batch_size": 1, "accumulation": 2},
    },
    "dot lower-first": {
        **{"weighting": "table", "bound": "clip", "normalise": "table"},
        **{"route": "dot", "batch_size": 1, "order": "lower-first"},
    },
    "ghost": {"route": "ghost"},
    "per-example": {"route": "per-example", "order": "lower-first"},
    "reverse": {"route": "reverse"},
    "central-difference": {"route": "central-difference"},
    "rollback": {"rollback": True},
    "unrolled": {"hypergradient": "unrolled", "unroll_steps": 2, "upper_start": 2, "steps": 10},
    "penalty": {"hypergradient": "penalty"},
    "resident": {"execution": "resident", "direction_decay": 0.0},
    "resident dot": {
        **{"weighting": "table", "bound": "clip", "normalise": "table", "execution": "resident"},
        **{"route": "dot", "batch_size": 1, "order": "lower-first", "direction_decay": 0.0},
    },
    "resident average": {"execution": "resident", "direction_decay": 0.5},
    "resident none": {"weighting": "none", "execution": "resident"},
}
"""Runs by name. For forward mode, which these do not see, there is ``tests.faked``."""

ON_CPU = "table on the CPU"
FAULTS = "faults"
FORWARD_MODE = "forward mode"
RACE = "race"
LAUNCHES = "launches"
USES = ("cold-start", "score", "evaluate", "weigh", "small-loss")


def main(out: str, directory: str, *names: str) -> None:
    """Run scenarios, and write what was noted to ``out``."""
    import recipes.models.loading
    import recipes.run.identity
    from prm.placement import Placement

    accelerator.register()
    task, noted = make_task(Path(directory) / "task"), {}
    for name in names:
        if name == FORWARD_MODE:
            noted[name] = faked.run(task)
            Path(out).write_text(json.dumps(noted))
            continue
        placement = Placement() if name == ON_CPU else Placement(accelerator.device())
        recipes.models.loading.resolve = lambda *_, p=placement: p
        recipes.run.identity.resolve = lambda *_, p=placement: p
        folder = Path(directory) / name.replace(" ", "-")
        noted[name] = _noted(lambda f=folder, n=name: _scenario(task, f, n))
        Path(out).write_text(json.dumps(noted))


def _noted(scenario: Callable[[], list[float]]) -> dict[str, Any]:
    import recipes.train.loop

    marks: list[tuple[int, int]] = []
    take = recipes.train.loop.next_steps
    error, losses = None, []
    with accelerator.Accelerator() as active:

        def marked(training: Any, state: Any, *args: Any) -> Any:
            marks.append((int(state.lower_steps), len(active.events)))
            return take(training, state, *args)

        recipes.train.loop.next_steps = marked
        try:
            losses = scenario()
        except Exception:
            error = traceback.format_exc()
        finally:
            recipes.train.loop.next_steps = take
    found: dict[str, Any] = {"mix-ups": [], "waits": {}, "error": error, "losses": losses}
    found["kinds"] = [event.kind for event in active.events]
    for event in active.events:
        if event.kind == "mix-up":
            found["mix-ups"].append(f"{event.operation} at {event.place}, line {event.line}")
    begins = [place for place, (taken, _) in enumerate(marks) if taken == STEP]
    ends = [mark for _, mark in marks[begins[-1] : begins[-1] + 2]] if begins else [0, 0]
    for event in active.events[slice(*ends)]:
        if event.kind == "wait":
            found["waits"][event.place] = found["waits"].get(event.place, 0) + 1
    return found


def _scenario(task: Task, folder: Path, name: str) -> list[float]:
    from recipes.train.cold_start import run_cold_start
    from recipes.train.training import run_training

    if name == FAULTS:
        return _faults()
    if name == RACE:
        return _race()
    if name == LAUNCHES:
        return _launches()
    if name == "cold-start":
        return _logged(run_cold_start(task.cold_start(folder, steps=STEPS, log_every=2)))
    if name in TRAININGS or name == ON_CPU:
        more = {"save_every": 9, "log_every": 2, "steps": STEPS}
        more |= TRAININGS["table" if name == ON_CPU else name]
        return _logged(run_training(task.train(folder, **more)))
    _use(task, folder, name)
    return []


def _logged(run: Path) -> list[float]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["lower_loss"] for line in lines]


def _use(task: Task, folder: Path, name: str) -> None:
    from recipes import commands
    from recipes.embedded.vocabulary import SYSTEM_PROMPT
    from recipes.options.use import EvaluateOptions, ScoreOptions, WeighOptions
    from recipes.train.training import run_training

    common = {"model": str(task.model), "system_prompt": SYSTEM_PROMPT, "output": str(folder)}
    file = str(task.data / "train.jsonl")
    options: Any
    if name == "score":
        options = ScoreOptions(**common, file=file)
    elif name == "evaluate":
        options = EvaluateOptions(**common, file=str(task.data / "test.jsonl"))
    elif name == "small-loss":
        options = WeighOptions(**common, file=file, by="small-loss")
    else:
        run = run_training(task.train(folder.with_name("weighed"), steps=2))
        options = WeighOptions(**common, file=file, weighting=str(run / "weighting"))
    command = "weigh" if name in ("weigh", "small-loss") else name
    assert commands.run(command, options) == 0, f"{command} failed"


def _race() -> list[float]:
    """Take iterations of the contenders on a GPU; return the last hypergradients in pairs.

    The first of a pair is of the accelerator, the second of the CPU.
    """
    from recipes.evidence.bench.race.model import SHAPES
    from recipes.evidence.gpu import case
    from recipes.evidence.gpu.subject import iteration, race_at

    found = []
    for contender in (case.FLOOR, case.PASSES, case.ORIGINAL, case.DOT, case.GHOST):
        for place in (accelerator.device(), torch.device("cpu")):
            begun = _started(SHAPES["tiny"], place)
            race = race_at(begun, case.Case("step", contender, case.FULL_PRECISION))
            run = iteration(race, contender, race.batch(1, 1), race.batch(1, 2))
            for _ in range(3):
                hypergradient = run()
            if hypergradient is not None:
                found.append(float(hypergradient.sum()))
    return found


def _launches() -> list[float]:
    """Return the kernels of both passes of an InternVL3-1B, and what iterations start beside them.

    Of the passes those for 1 and for 8 examples come first.
    The model has all its 733 tensors, with 1/32 of the widths, and so 1/1024 of the entries. Its
    images and texts are short, and take the rules of long ones.
    """
    import bilevel.resident.parts
    import bilevel.resident.pieces
    from bilevel.lower.ghost import rows, uses
    from recipes.evidence.bench.race.model import Shape
    from recipes.evidence.gpu import case
    from recipes.evidence.gpu.subject import iteration, race_at

    # torch takes lists of these types to its multi-tensor kernels.
    torch.utils._foreach_utils._foreach_supported_types.append(accelerator.Pretended)
    bilevel.resident.pieces.ENTRIES //= SMALLER
    bilevel.resident.parts.DEVICE_ENTRIES //= SMALLER
    rows.OFF_CPU_CHUNK_ENTRIES //= SMALLER
    long, uses.FORM_OFF_CPU_FROM = uses.FORM_OFF_CPU_FROM, SHORT
    shape = Shape("1/32 width", 24, 28, 152, 32, vocabulary=4740, image=56, text=40)
    begun = _started(shape, accelerator.device())
    found: list[float] = []
    own: dict[int, int] = {}
    passes = [(case.PASSES, examples) for examples in sorted({*LAUNCHING.values()})]
    for contender, examples in (*passes, *LAUNCHING.items()):
        race = race_at(begun, case.Case("step", contender, case.FULL_PRECISION))
        assert len(race.params) == 733
        run = iteration(race, contender, race.batch(examples, 1), race.batch(examples, 2))
        run()
        with Launches(SMALLER) as counted:
            run()
        total = counted.launched.total()
        found.append(total - own.get(examples, 0))
        own.setdefault(examples, total)
    bilevel.resident.pieces.ENTRIES *= SMALLER
    bilevel.resident.parts.DEVICE_ENTRIES *= SMALLER
    rows.OFF_CPU_CHUNK_ENTRIES *= SMALLER
    uses.FORM_OFF_CPU_FROM = long
    return found


def _started(shape: Any, place: torch.device) -> Any:
    """Return a model of the race that was drawn on the CPU and moved."""
    from recipes.evidence.gpu.subject import start

    begun = start(shape, "cpu")
    begun.race.objective.prm.model.to(place)
    begun.race.weights["deviation"] = begun.race.weights["deviation"].to(place)
    return begun


def _faults() -> list[float]:
    """Make one fault of each kind, and return what the accelerator computed."""
    there = torch.arange(3.0).to(accelerator.device())  # a transfer
    mixed = there + torch.ones(3)  # a mix-up
    chosen = there[there > 0]  # a wait for the number of results
    mixed = mixed + torch.tensor(1.0)  # a number is none
    bad = torch.tensor([math.nan, math.inf, -math.inf, 3e38]).to(accelerator.device())
    finite = [tree.allfinite({"a": there, "b": value}) for value in bad.split(1)]
    there.repeat_interleave(torch.ones_like(there, dtype=torch.int64), output_size=3)
    there.repeat_interleave(torch.ones_like(there, dtype=torch.int64))  # a wait for its length
    flat = torch.zeros(2).to(accelerator.device())  # a transfer
    nothing = pair_loss(flat, flat, flat.long())  # no pair
    weights = (there - 1.0, flat)  # without a mean; without a part in the batch
    finite += [*(batch_mean_one(one).isfinite().all() for one in weights), nothing.isfinite()]
    norm = tree.norm([there + leaf for leaf in range(MANY)])
    sums = {"finite": torch.stack(finite), "sum": mixed.sum(), "norm": norm}
    found = tree.on_host(sums)  # a wait
    finite_ones = map(float, found["finite"])
    return [float(found["sum"]), float(found["norm"]), *chosen.tolist(), *finite_ones]  # a wait


if __name__ == "__main__":
    main(*sys.argv[1:])
