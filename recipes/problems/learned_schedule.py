"""Learning rate and weight decay of every step of a short training run: ``make learned-schedule``.

The upper parameters are the logarithms of two numbers per step k, the rate η_k and the decay δ_k::

    θ_{k+1} = θ_k − η_k ∇ℓ_k(θ_k) − δ_k θ_k        k = 0 … K − 1
    minimise over η, δ   the loss of θ_K on validation rows

The hypergradient is that of the whole run. Every run starts from a new network and a new order of
the rows, so that the schedule does not fit a single run. Rates increase as long as that helps. With
a large step on the schedule (``--upper-lr 0.1``) they pass the limit of stable training, and the
hypergradient of a diverged run does not lead back. The core is used in ``lower_loss``,
``upper_loss``, ``make_solver`` and ``learn``.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import SGD, Adam, BilevelProblem, BilevelSolver, Unrolled, WarmupCosine
from recipes.options.base import option
from recipes.problems.digit_reweighting import init_network, logits
from recipes.problems.digit_scans import Scans, read_splits, with_wrong_labels
from recipes.problems.report import check_options, mean_interval, percent, run_recipe, text_table

VALIDATION, MOST_ROWS = 500, 600
_RATES = tuple(0.2 * 2 ** (power / 2) for power in range(9))  # 0.2 to 3.2
_DECAYS = (0.0, 1e-3, 3e-3, 1e-2)  # as a share of the rate
_LEAST = 1e-12  # Replaces 0 before the logarithm.
_SHAPES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
_FOR_GRID, _FOR_TEST = 10_000, 20_000  # First seeds of the runs; those of learning start at 0.

Params = dict[str, Tensor]
Schedule = dict[str, Tensor]  # log_rate [K], log_decay [K]
Batch = Mapping[str, Any]


class Task(NamedTuple):
    """Disjoint rows, and the initial network and batches of the run of a seed."""

    train: Scans
    validation: Scans
    test: Scans
    network: Callable[[int], Params]
    batches: Callable[
        [int], list[list[Batch]]
    ]  # One micro-batch per step, which holds the step's number.


def lower_loss(theta: Params, schedule: Schedule, batch: Batch) -> Tensor:
    """Return η_k ℓ_k(θ) + ½ δ_k ‖θ‖², on which gradient descent with rate 1 is step k."""
    rate, decay = (schedule[name][batch["step"]].exp() for name in ("log_rate", "log_decay"))
    size = torch.stack([leaf.square().sum() for leaf in theta.values()]).sum()
    return rate * cross_entropy(logits(theta, batch["x"]), batch["y"]) + 0.5 * decay * size


def upper_loss(theta: Params, schedule: Schedule, batch: Batch) -> Tensor:
    """Return the validation loss of the trained network."""
    return cross_entropy(logits(theta, batch["x"]), batch["y"])


def make_solver(steps: int, runs: int, upper_lr: float) -> BilevelSolver[Params, Schedule, Batch]:
    """Return a solver whose window is one training run."""
    return BilevelSolver(
        BilevelProblem(lower_loss, upper_loss),
        lower_optimizer=SGD(1.0),
        upper_optimizer=Adam(WarmupCosine(upper_lr, 0, runs)),
        hypergradient=Unrolled(),
        unroll_steps=steps,
    )


def learn(
    solver: BilevelSolver[Params, Schedule, Batch], task: Task, schedule: Schedule, runs: int
) -> Schedule:
    """Learn the schedule by one upper step after each training run."""
    validation = {"x": task.validation.x, "y": task.validation.y}
    state = solver.init(task.network(0), schedule)
    for run in range(runs):
        fresh = task.network(run)
        state = state._replace(
            lower_params=fresh, lower_optimizer=solver.lower_optimizer.init(fresh)
        )
        state, _ = solver.window(state, task.batches(run), validation)
    return state.upper_params


# The use of the core ends here. What follows compares with schedules from a grid.


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Options of the command."""

    seed: int = option(0, "fixes rows, wrong labels, networks and order", least=0)
    steps: int = option(40, "K, lower steps of a training run", least=0)
    runs: int = option(100, "training runs to learn the schedule from")
    upper_lr: float = option(0.05, "learning rate of Adam on the logarithms of rates and decays")
    start_rate: float = option(0.1, "rate of every step before learning")
    start_decay: float = option(1e-3, "decay of every step before learning")
    rows: int = option(300, "training rows")
    wrong_share: float = option(0.3, "share of their labels that are wrong")
    batch_size: int = option(50, "rows per lower step", least=1)
    hidden: int = option(64, "units in the hidden layer of the classifier")
    grid_runs: int = option(5, "training runs per schedule of the grid")
    test_runs: int = option(10, "fresh training runs that each schedule is judged by")
    threads: int = option(1, "CPU threads of torch (0: all cores)", least=0)
    output: str | None = option(None, "write every figure to this JSON file")

    def __post_init__(self) -> None:
        check_options(
            self,
            ("steps", self.steps >= 1, "1 or more"),
            ("runs", self.runs >= 1, "1 or more"),
            ("start_rate", self.start_rate > 0, "more than 0"),
            ("start_decay", self.start_decay > 0, "more than 0"),
            ("rows", 1 <= self.rows <= MOST_ROWS, f"1 to {MOST_ROWS}"),
            ("wrong_share", 0 <= self.wrong_share < 1, "0 or more, less than 1"),
            ("batch_size", 1 <= self.batch_size <= self.rows, "1 or more, --rows at most"),
            ("hidden", self.hidden >= 1, "1 or more"),
            ("grid_runs", self.grid_runs >= 1, "1 or more"),
            ("test_runs", self.test_runs >= 1, "1 or more"),
            ("upper_lr", self.upper_lr >= 0, "0 or more"),
        )


def make_task(options: ScheduleOptions) -> Task:
    """Split the scans and corrupt labels of the training rows."""
    splits = read_splits(torch.Generator().manual_seed(options.seed))
    train, validation = (
        splits.train[torch.arange(options.rows)],
        splits.train[torch.arange(MOST_ROWS, MOST_ROWS + VALIDATION)],
    )
    spoilt = with_wrong_labels(train, options.wrong_share, _generator(options, 0, 0))

    def network(run: int) -> Params:
        return init_network(options.hidden, _generator(options, run, 1))

    def batches(run: int) -> list[list[Batch]]:
        generator, queue = _generator(options, run, 2), torch.empty(0, dtype=torch.int64)
        drawn: list[list[Batch]] = []
        for step in range(options.steps):
            if len(queue) < options.batch_size:
                queue = torch.cat([queue, torch.randperm(options.rows, generator=generator)])
            row, queue = queue[: options.batch_size], queue[options.batch_size :]
            drawn.append([{"x": spoilt.x[row], "y": spoilt.y[row], "step": step}])
        return drawn

    return Task(spoilt, validation, splits.test, network, batches)


def _generator(options: ScheduleOptions, run: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed((options.seed << 32) + 10 * run + purpose)


def constant(steps: int, rate: float, decay: float) -> Schedule:
    """Return the schedule with the same rate and decay at every step."""
    return from_shape(_SHAPES["constant"], steps, rate, decay / rate)


def from_shape(shape: Callable[[float], float], steps: int, peak: float, decay: float) -> Schedule:
    """Return the schedule η_k = peak · shape(k / K), δ_k = decay · η_k."""
    rates = torch.tensor([peak * shape(step / steps) for step in range(steps)])
    return {
        "log_rate": rates.clamp(min=_LEAST).log(),
        "log_decay": (decay * rates).clamp(min=_LEAST).log(),
    }


def train(task: Task, schedule: Schedule, run: int) -> Params:
    """Return θ_K of one run by the same solver, without upper steps."""
    solver = make_solver(len(schedule["log_rate"]), 1, 0.0)
    state, _ = solver.window(solver.init(task.network(run), schedule), task.batches(run))
    return state.lower_params


@torch.no_grad()
def judge(theta: Params, rows: Scans) -> tuple[float, float]:
    """Return loss and accuracy by the true labels."""
    outputs = logits(theta, rows.x)
    right = outputs.argmax(1) == rows.true
    return float(cross_entropy(outputs, rows.true)), float(right.double().mean())


def search_grid(
    task: Task, options: ScheduleOptions, shape: Callable[[float], float]
) -> tuple[Schedule, dict[str, float]]:
    """Return the schedule of the peak rate and decay with the least mean validation loss."""
    candidates: list[tuple[float, float, float]] = []
    for rate in _RATES:
        for decay in _DECAYS:
            schedule = from_shape(shape, options.steps, rate, decay)
            losses = [
                judge(train(task, schedule, _FOR_GRID + run), task.validation)[0]
                for run in range(options.grid_runs)
            ]
            loss = math.fsum(losses) / len(losses)
            candidates.append((loss if math.isfinite(loss) else math.inf, rate, decay))
    _, rate, decay = min(candidates)
    chosen = {"rate": rate, "decay_over_rate": decay}
    return from_shape(shape, options.steps, rate, decay), chosen


def compare(options: ScheduleOptions) -> tuple[str, dict[str, Any]]:
    """Learn the rate and decay of every step of a training run, by differentiating through it."""
    task = make_task(options)
    schedules: dict[str, Schedule] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, shape in _SHAPES.items():
        title, started = f"{name}, best of a grid", time.process_time()
        schedules[title], chosen = search_grid(task, options, shape)
        rows[title] = {
            **chosen,
            "runs": len(_RATES) * len(_DECAYS) * options.grid_runs,
            "seconds": time.process_time() - started,
        }
        print(f"{title}: {rows[title]['seconds']:.1f} s", file=sys.stderr)
    begin = constant(options.steps, options.start_rate, options.start_decay)
    solver, started = (
        make_solver(options.steps, options.runs, options.upper_lr),
        time.process_time(),
    )
    schedules |= {"before learning": begin, "learned": learn(solver, task, begin, options.runs)}
    rows |= {
        "before learning": {"runs": 0, "seconds": 0.0},
        "learned": {"runs": options.runs, "seconds": time.process_time() - started},
    }
    print(f"learned: {rows['learned']['seconds']:.1f} s", file=sys.stderr)
    for title, schedule in schedules.items():
        runs = range(_FOR_TEST, _FOR_TEST + options.test_runs)
        trained = [train(task, schedule, run) for run in runs]
        test = [judge(theta, task.test) for theta in trained]
        rows[title] |= {
            "validation_loss": mean_interval([judge(t, task.validation)[0] for t in trained]),
            "test_loss": mean_interval([loss for loss, _ in test]),
            "test_accuracy": mean_interval([accuracy for _, accuracy in test]),
            "rates": schedule["log_rate"].exp().tolist(),
            "decays": schedule["log_decay"].exp().tolist(),
        }
    text = f"{_table(rows)}\n\nlearned, step by step\n{_steps(rows['learned'])}"
    return text, {"seeds": [options.seed], "rows": rows}


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of means over new training runs."""
    lines = [
        [
            "schedule",
            "validation loss",
            "test loss (95 %)",
            "test accuracy, % (95 %)",
            "training runs to find it",
            "CPU seconds",
        ]
    ]
    for title, row in rows.items():
        loss = row["test_loss"]
        ends = "" if loss.low is None else f" [{loss.low:.3f}, {loss.high:.3f}]"
        lines.append(
            [
                title,
                f"{row['validation_loss'].mean:.3f}",
                f"{loss.mean:.3f}{ends}",
                percent(row["test_accuracy"]),
                str(row["runs"]),
                f"{row['seconds']:.1f}",
            ]
        )
    return text_table(lines)


def _steps(row: Mapping[str, Any]) -> str:
    """Return a table of rate and decay at about ten steps."""
    count = len(row["rates"])
    shown = sorted({round(tenth * (count - 1) / 9) for tenth in range(10)})
    return text_table(
        [
            ["step", *(str(step + 1) for step in shown)],
            ["rate", *(f"{row['rates'][step]:.2f}" for step in shown)],
            ["decay", *(f"{row['decays'][step]:.1e}" for step in shown)],
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_recipe("recipes.problems.learned_schedule", ScheduleOptions, compare, arguments)


if __name__ == "__main__":
    sys.exit(main())
