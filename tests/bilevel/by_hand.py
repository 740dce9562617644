"""One SGD step of a problem and its hypergradient by the plainest autograd: one graph of both."""

from __future__ import annotations

import torch

from bilevel import SGD, BilevelSolver, tree

LR = 0.3


def cubes(lower, upper, batch):
    """An upper loss whose gradient differs from entry to entry."""
    return sum((leaf**3).sum() for leaf in tree.leaves(lower))


def step_by_hand(lower_loss, params, upper, batch, steps=1, upper_loss=cubes):
    """Parameters after SGD steps on ``lower_loss``, and the derivative of the upper loss in φ."""
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), upper)
    at = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    for _ in range(steps):
        loss = lower_loss(at, leaves, batch)
        grads = torch.autograd.grad(loss, list(at.values()), create_graph=True)
        at = {name: leaf - LR * g for (name, leaf), g in zip(at.items(), grads, strict=True)}
    loss = upper_loss(at, leaves, batch)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    derivative = dict(zip(leaves, found, strict=True))
    return tree.map(torch.Tensor.detach, at), derivative


def step_of_solver(problem, method, params, upper, batches, upper_batch, steps=1):
    """The same by a solver, and the notes; φ takes an SGD step of size 1."""
    solver = BilevelSolver(
        problem,
        SGD(LR),
        SGD(1.0),
        method,
        unroll_steps=steps,
        accumulation=len(batches),
    )
    state, infos = solver.window(solver.init(params, upper), [batches] * steps, upper_batch)
    moved = tree.map(lambda old, new: old - new, upper, state.upper_params)
    return state.lower_params, moved, infos[-1].notes
