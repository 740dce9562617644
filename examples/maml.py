"""MAML: an initialisation φ of a small network f from which three steps fit a new sine wave.

Every window starts anew from φ (``initial``). Tasks are a dimension of θ: twenty adapt at once::

    minimise over φ   Σ_t ‖f(θ_t(φ)) − y_t‖²   on 10 other points of wave t
    θ_t(φ): three gradient steps from φ on   ‖f(θ_t) − y_t‖²   on 10 points of it

Look at errors from the φ of MAML (Finn et al. 2017), a random one, and one of joint training.
Run: python examples/maml.py
"""

from functools import partial

import torch
from torch import Tensor

from bilevel import SGD, Adam, BilevelProblem, BilevelSolver, Unrolled, tree

Params = dict[str, Tensor]
Rows = tuple[Tensor, Tensor]  # x and y, each [tasks, points, 1]
SHAPES = {"w1": (1, 40), "b1": (1, 40), "w2": (40, 40), "b2": (1, 40), "w3": (40, 1)}


def error(theta: Params, phi: Params, rows: Rows) -> Tensor:
    """Mean squared errors, added up: to each task's θ the gradient of its own error."""
    hidden = torch.tanh(torch.tanh(rows[0] @ theta["w1"] + theta["b1"]) @ theta["w2"] + theta["b2"])
    return (hidden @ theta["w3"] - rows[1]).square().mean((1, 2)).sum()


def draw(tasks: int) -> tuple[Rows, Rows]:
    """New tasks: points to adapt to, other points of the same waves."""
    size, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1), torch.pi * torch.rand(tasks, 1, 1)
    x, z = 10 * torch.rand(2, tasks, 10, 1) - 5
    return (x, size * torch.sin(x + phase)), (z, size * torch.sin(z + phase))


def solver_for(tasks: int, rate: float) -> BilevelSolver[Params, Params, Rows]:
    """A window is three steps of so many tasks, each from φ."""
    problem = BilevelProblem(error, error)
    each = partial(tree.map, lambda leaf: leaf.repeat(tasks, 1, 1))
    return BilevelSolver(problem, SGD(rate), Adam(0.01), Unrolled(), 3, initial=each)


def main() -> dict[str, float]:
    """Learn two initialisations; print and return mean errors on 500 new tasks."""
    torch.manual_seed(0)
    figures, (known, other), judge = {}, draw(500), solver_for(500, 0.03)
    random = {name: torch.randn(s) / s[0] ** 0.5 for name, s in SHAPES.items()}
    for name, rate, steps in ("random", 0.0, 0), ("joint", 0.0, 250), ("MAML", 0.03, 250):
        state = (solver := solver_for(20, rate)).init(None, random)
        for rows, upper_rows in (draw(20) for _ in range(steps)):
            state, _ = solver.window(state, [[rows]] * 3, upper_rows)
        adapted, _ = judge.window(judge.init(None, state.upper_params), [[known]] * 3)
        figures[name] = float(error(adapted.lower_params, random, other)) / 500
        print(f"error after three steps, {name} φ: {figures[name]:.2f}")
    return figures


if __name__ == "__main__":
    main()
