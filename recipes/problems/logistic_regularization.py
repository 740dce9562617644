"""One L2 penalty per feature of a logistic regression, learned on held-out rows.

Run by ``make regularization``. With rows x_i, labels y_i = ±1 and λ_j per feature::

    w*(λ) = argmin_w  mean_train log(1 + exp(−y_i ⟨x_i, w⟩)) + ½ Σ_j exp(λ_j) w_j²
    minimise over λ   mean_validation log(1 + exp(−y_i ⟨x_i, w*(λ)⟩)) + (strength / 2d) ‖λ − λ₀‖²

These are the formulas of benchmark_bilevel (Dagréou et al. 2022, arXiv 2201.13409) with a prior on
λ. Without it the best λ is infinite, since 30 features can separate the validation rows. The core
is used in ``lower_loss``, ``upper_loss``, ``make_solver`` and ``search``; the rest is a dense
solution to compare with.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel import (
    SGD,
    Adam,
    BilevelProblem,
    BilevelSolver,
    BilevelState,
    ConjugateGradient,
    Hypergradient,
    Implicit,
    StepInfo,
    Unrolled,
    WarmupCosine,
)
from recipes.options.base import option
from recipes.problems.report import check_options, mean_interval, percent, run_recipe, text_table

START, PRIOR = -4.0, 0.03  # λ₀, where the search starts, and the strength of the prior
TRAIN, VALIDATION = 200, 150  # rows; the other 219 are for testing
FIRST_SOLVE = 300  # lower steps before the first step on λ


class Rows(NamedTuple):
    """Features [rows, features] and labels ±1 [rows]."""

    x: Tensor
    y: Tensor


def logistic_loss(w: Tensor, rows: Rows) -> Tensor:
    """Return the mean logistic loss over the rows."""
    return softplus(-rows.y * (rows.x @ w)).mean()


def lower_loss(w: Tensor, penalties: Tensor, rows: Rows) -> Tensor:
    """Return the loss that w minimises."""
    return logistic_loss(w, rows) + 0.5 * (penalties.exp() * w.square()).sum()


def upper_loss(w: Tensor, penalties: Tensor, rows: Rows) -> Tensor:
    """Return the loss that λ minimises, in which λ also occurs directly."""
    return logistic_loss(w, rows) + PRIOR / 2 * (penalties - START).square().mean()


def make_solver(
    hypergradient: Hypergradient, lower_steps: int, upper_steps: int
) -> BilevelSolver[Tensor, Tensor, Rows]:
    """Return a solver with ``lower_steps`` of gradient descent with momentum per step on λ."""
    return BilevelSolver(
        BilevelProblem(lower_loss, upper_loss),
        lower_optimizer=SGD(0.5, momentum=0.9, nesterov=True),
        upper_optimizer=Adam(WarmupCosine(0.2, 0, upper_steps)),
        hypergradient=hypergradient,
        unroll_steps=lower_steps,
    )


def search(
    solver: BilevelSolver[Tensor, Tensor, Rows], train: Rows, validation: Rows, upper_steps: int
) -> Iterator[tuple[BilevelState[Tensor, Tensor], StepInfo]]:
    """Yield the state after every window. Steps use all rows, and w continues across windows."""
    zeros = train.x.new_zeros(train.x.shape[1])
    state = solver.init(zeros, zeros + START)
    state, _ = solver.window(state, [[train]] * FIRST_SOLVE)
    for _ in range(upper_steps):
        state, infos = solver.window(state, [[train]] * solver.unroll_steps, validation)
        yield state, infos[-1]


# The use of the core ends here. What follows compares it with a dense solution.


@dataclass(frozen=True, kw_only=True)
class RegularizationOptions:
    """Options of the command."""

    seed: int = option(0, "the first seed", least=0)
    seeds: int = option(3, "how many; each splits the rows in its own way", least=1)
    lower_steps: int = option(40, "steps on w per step on the penalties")
    truncated: int = option(10, "how many of them the truncated unroll goes through")
    upper_steps: int = option(100, "steps on the penalties")
    cg_iterations: int = option(10, "of the implicit hypergradient; each starts at the last answer")
    threads: int = option(1, "CPU threads of torch (0: all cores)", least=0)
    output: str | None = option(None, "write every figure to this JSON file")

    def __post_init__(self) -> None:
        check_options(
            self,
            ("lower_steps", self.lower_steps >= 1, "1 or more"),
            ("truncated", 1 <= self.truncated <= self.lower_steps, "1 to --lower-steps"),
            ("upper_steps", self.upper_steps >= 1, "1 or more"),
            ("cg_iterations", self.cg_iterations >= 1, "1 or more"),
        )


class Splits(NamedTuple):
    """Disjoint rows, standardised by the training rows."""

    train: Rows
    validation: Rows
    test: Rows


def read_splits(generator: torch.Generator) -> Splits:
    """Return a random split of scikit-learn's breast-cancer data, float64: 200, 150 and 219 rows.

    Raises:
        ModuleNotFoundError: Scikit-learn, which contains the data, is not installed.
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the breast-cancer data are inside scikit-learn, which is not installed; install it "
            "with: pip install 'bilevel-prm[demo]'"
        ) from error
    bunch: Any = load_breast_cancer()
    x, y = torch.as_tensor(bunch.data), torch.as_tensor(bunch.target).double() * 2 - 1
    order = torch.randperm(len(y), generator=generator)
    parts = order.split([TRAIN, VALIDATION, len(y) - TRAIN - VALIDATION])
    centre, scale = x[parts[0]].mean(0), x[parts[0]].std(0)
    return Splits(*(Rows((x[part] - centre) / scale, y[part]) for part in parts))


def solve_lower(penalties: Tensor, train: Rows) -> tuple[Tensor, Tensor]:
    """Return w*(λ) [features] and the Hessian of the lower loss there, by Newton's method.

    Every step is halved until the loss falls by a tenth of what the gradient predicts.
    """
    x, y, strength = train.x, train.y, penalties.exp()
    w = torch.zeros_like(penalties)
    for _ in range(100):
        wrong = torch.sigmoid(-y * (x @ w))
        gradient = strength * w - x.T @ (y * wrong) / len(y)
        hessian = (x.T * (wrong * (1 - wrong))) @ x / len(y) + torch.diag(strength)
        step = torch.linalg.solve(hessian, gradient)
        promised, before, size = gradient @ step, lower_loss(w, penalties, train), 1.0
        if promised <= 1e-28:
            break
        while promised > 1e-12 and (
            lower_loss(w - size * step, penalties, train) > before - 0.1 * size * promised
        ):
            size /= 2
        w = w - size * step
    return w, hessian


def exact(penalties: Tensor, splits: Splits) -> tuple[Tensor, Tensor, Tensor]:
    """Return upper loss, hypergradient and w* by implicit differentiation with a dense Hessian."""
    w, hessian = solve_lower(penalties, splits.train)
    leaves = w.clone().requires_grad_(), penalties.clone().requires_grad_()
    loss = upper_loss(*leaves, splits.validation)
    v, direct = torch.autograd.grad(loss, leaves)
    return loss.detach(), direct - torch.linalg.solve(hessian, v) * penalties.exp() * w, w


def reference(splits: Splits) -> Tensor:
    """Return the minimiser λ that L-BFGS reaches from λ₀, at the end without a line search.

    Near the end losses differ by less than their rounding error, while gradients remain accurate.
    """
    features = splits.train.x.shape[1]
    penalties = splits.train.x.new_full((features,), START).requires_grad_()
    for line_search in ("strong_wolfe", None):
        optimizer = torch.optim.LBFGS(
            [penalties],
            max_iter=300,
            max_eval=600,
            tolerance_grad=1e-12,
            tolerance_change=1e-14,
            history_size=features,
            line_search_fn=line_search,
        )

        def closure(optimizer: torch.optim.LBFGS = optimizer) -> float:
            loss, gradient, _ = exact(penalties.detach(), splits)
            penalties.grad = gradient
            return float(loss)

        optimizer.step(closure)
    return penalties.detach()


def one_for_all(splits: Splits) -> Tensor:
    """Return the best of 41 single penalties from e^−10 to 1 by the validation loss."""
    grid = torch.linspace(-10.0, 0.0, 41, dtype=torch.float64)
    candidates = [value.expand(splits.train.x.shape[1]) for value in grid]
    best: Tensor = min(
        candidates,
        key=lambda p: float(logistic_loss(solve_lower(p, splits.train)[0], splits.validation)),
    )
    return best


def methods_of(options: RegularizationOptions) -> dict[str, Hypergradient]:
    """Return the hypergradients by title; their tolerance allows for a w that lags behind λ."""
    steps, short = options.lower_steps, options.truncated
    solver = ConjugateGradient(options.cg_iterations)
    return {
        "implicit, conjugate gradients": Implicit(solver, stationarity_tolerance=0.2),
        f"unrolled, {steps} steps": Unrolled(),
        f"unrolled, last {short} of {steps} steps": Unrolled(steps=short),
    }


def hessian_products(info: StepInfo, hypergradient: Hypergradient, lower_steps: int) -> int:
    """Return the number of products with ∂²L_lower/∂w² in a window.

    They are those of the linear solver, or one for every step except the first. Each method also
    takes one mixed product ∂²L_lower/∂λ∂w.
    """
    if isinstance(hypergradient, Unrolled):
        return hypergradient.exact_steps(lower_steps) - 1
    return int(info.figures["products"]) + 1  # One more measures how close w is to the solution.


def run_method(
    hypergradient: Hypergradient, splits: Splits, options: RegularizationOptions
) -> tuple[Tensor, dict[str, float]]:
    """Return the penalties that the core finds, and their cost in processor time and products."""
    started = time.process_time()
    solver = make_solver(hypergradient, options.lower_steps, options.upper_steps)
    windows = list(search(solver, splits.train, splits.validation, options.upper_steps))
    seconds = time.process_time() - started
    products = sum(
        hessian_products(info, hypergradient, options.lower_steps) for _, info in windows
    )
    penalties = windows[-1][0].upper_params
    return penalties, {"seconds": seconds, "hessian_products": float(products)}


def judged(penalties: Tensor, splits: Splits, best: float) -> dict[str, float]:
    """Return metrics of penalties at the exact w*, which Newton's method finds for all methods."""
    loss, gradient, w = exact(penalties, splits)
    right = splits.test.y * (splits.test.x @ w) > 0
    return {
        "upper_loss": float(loss),
        "gap": float(loss) - best,
        "gradient_norm": float(gradient.norm()),
        "test_accuracy": float(right.double().mean()),
        "test_loss": float(logistic_loss(w, splits.test)),
    }


def compare(options: RegularizationOptions) -> tuple[str, dict[str, Any]]:
    """Learn one L2 penalty per feature of a logistic regression by three hypergradients."""
    seeds = range(options.seed, options.seed + options.seeds)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        splits = read_splits(torch.Generator().manual_seed(seed))
        started = time.process_time()
        penalties = reference(splits)
        cost = {"seconds": time.process_time() - started}
        best = float(exact(penalties, splits)[0])
        rows: dict[str, tuple[Tensor, dict[str, float]]] = {
            "one penalty for all, grid": (one_for_all(splits), {}),
            "reference: dense and exact": (penalties, cost),
        }
        for title, hypergradient in methods_of(options).items():
            rows[title] = run_method(hypergradient, splits, options)
            print(f"seed {seed}: {title} {rows[title][1]['seconds']:.1f} s", file=sys.stderr)
        for title, (penalties, cost) in rows.items():
            runs.setdefault(title, []).append(
                {"seed": seed, **judged(penalties, splits, best), **cost}
            )
    return _table(runs), {"seeds": list(seeds), "runs": runs}


def _table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of means over the splits, with the largest gap of any split."""
    lines = [
        [
            "penalties",
            "upper loss",
            "gap to reference (largest)",
            "gradient norm (largest)",
            "test accuracy, % (95 %)",
            "test loss",
            "CPU seconds",
            "Hessian products",
        ]
    ]
    for title, rows in runs.items():
        mean = {key: math.fsum(run[key] for run in rows) / len(rows) for key in rows[0]}
        lines.append(
            [
                title,
                f"{mean['upper_loss']:.5f}",
                f"{max(run['gap'] for run in rows):.1e}",
                f"{max(run['gradient_norm'] for run in rows):.1e}",
                percent(mean_interval([run["test_accuracy"] for run in rows])),
                f"{mean['test_loss']:.4f}",
                f"{mean['seconds']:.1f}" if "seconds" in mean else "",
                f"{mean['hessian_products']:.0f}" if "hessian_products" in mean else "",
            ]
        )
    return text_table(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_recipe(
        "recipes.problems.logistic_regularization", RegularizationOptions, compare, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
