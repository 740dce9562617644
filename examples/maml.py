"""MAML: an initialisation φ of a small network f from which three steps fit a new sine wave.

A lower level of the core starts at given numbers, not at φ. So the lower parameters are what
adaptation to task t adds to φ: δ_t, a fresh 0 in every window::

    minimise over φ   Σ_t ‖f(φ + δ_t(φ)) − y_t‖²   on 10 other points of wave t
    δ_t(φ): three gradient steps from 0 on   ‖f(φ + δ_t) − y_t‖²   on 10 points of it

This is MAML (Finn et al. 2017) with its second derivatives. Look at the error on new tasks from
MAML's φ, a random one, and one trained on all tasks jointly (the same with a learning rate of 0).
Run: python examples/maml.py
"""

import torch
from torch import Tensor

from bilevel import SGD, Adam, BilevelProblem, BilevelSolver, Unrolled

Params = dict[str, Tensor]
Rows = tuple[Tensor, Tensor]  # x and y, each [tasks, points, 1]
SHAPES = {"w1": (1, 40), "b1": (1, 40), "w2": (40, 40), "b2": (1, 40), "w3": (40, 1)}


def error(delta: Params, phi: Params, rows: Rows) -> Tensor:
    """Mean squared errors, added up: to each task's δ the gradient of its own error."""
    p = {name: phi[name] + delta[name] for name in phi}
    hidden = torch.tanh(torch.tanh(rows[0] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"])
    return (hidden @ p["w3"] - rows[1]).square().mean((1, 2)).sum()


def draw(tasks: int) -> tuple[Params, Rows, Rows]:
    """New tasks: δ = 0, points to adapt to, other points of the same waves."""
    size, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1), torch.pi * torch.rand(tasks, 1, 1)
    x, z = 10 * torch.rand(2, tasks, 10, 1) - 5
    zeros = {name: torch.zeros(tasks, *shape) for name, shape in SHAPES.items()}
    return zeros, (x, size * torch.sin(x + phase)), (z, size * torch.sin(z + phase))


def main() -> dict[str, float]:
    """Learn two initialisations; print and return mean errors on 500 new tasks."""
    torch.manual_seed(0)
    found = {"random": {name: torch.randn(s) / s[0] ** 0.5 for name, s in SHAPES.items()}}
    for name, rate in ("joint", 0.0), ("MAML", 0.03):
        solver = BilevelSolver(BilevelProblem(error, error), SGD(rate), Adam(0.01), Unrolled(), 3)
        state = solver.init(draw(20)[0], found["random"])
        for _ in range(250):
            delta, known, other = draw(20)
            state = state._replace(lower_params=delta)  # SGD keeps no moments to forget
            state, _ = solver.window(state, [[known]] * 3, other)
        found[name] = state.upper_params
    figures, (delta, known, other) = {}, draw(500)
    for name, phi in found.items():  # all adapt with MAML's solver
        state, _ = solver.window(solver.init(delta, phi), [[known]] * 3)
        figures[name] = float(error(state.lower_params, phi, other)) / 500
        print(f"error after three steps, {name} φ: {figures[name]:.2f}")
    return figures


if __name__ == "__main__":
    main()
