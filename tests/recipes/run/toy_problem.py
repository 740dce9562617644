"""A small problem with everything that a checkpoint has to hold.

Random losses at both levels, an average of v, moments of both optimizers, integer counts.
"""

from __future__ import annotations

import torch

from bilevel import AdamW, BilevelProblem, BilevelSolver, LazyRowAdam, OneStep, Reverse

TOY: dict = {"options": {}, "files": {}, "model": "toy"}


def toy():
    def lower_loss(theta, phi, batch):
        noise = torch.rand(len(batch["x"]), dtype=torch.float64)
        return (
            torch.sigmoid(phi["raw"][batch["row"]]) * noise * (theta["w"] - batch["x"]) ** 2
        ).mean()

    def upper_loss(theta, phi, batch):
        return ((theta["w"] - 1 + 0.1 * torch.rand(())) ** 2).mean()

    solver = BilevelSolver(
        BilevelProblem(lower_loss, upper_loss),
        AdamW(0.05),
        LazyRowAdam(0.1),
        OneStep(Reverse(), direction_decay=0.5),
        upper_start=1,
    )
    theta, phi = torch.zeros(1, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    return solver, solver.init({"w": theta}, {"raw": phi})
