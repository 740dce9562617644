"""A case of the zoo from a warm point: one lower step, or a window of three."""

from __future__ import annotations

import torch

from bilevel import SGD, Adagrad, Adam, AdamW, RMSProp, WarmupCosine, tree
from tests.bilevel.run_window import run_step, run_window
from tests.bilevel.variants import pick
from tests.oracles import random_like, slope, upper_after_step

OPTIMIZERS = {
    "sgd": SGD(0.3),
    "momentum": SGD(0.3, 0.8),
    "nesterov": SGD(
        0.3, 0.8, nesterov=True, weight_decay=0.1, decay_mask=lambda name: "head" not in name
    ),
    "adam": Adam(0.05, (0.8, 0.9), 1e-3, weight_decay=0.1),
    "adamw": AdamW(
        WarmupCosine(0.05, 2, 20),
        (0.8, 0.9),
        1e-3,
        weight_decay=0.1,
        decay_mask=lambda name: not name.endswith("bias"),
    ),
    "rmsprop": RMSProp(0.05, 0.9, 1e-3),
    "adagrad": Adagrad(WarmupCosine(0.05, 2, 20), 1e-3),
}
"""Every optimizer, between them with every option but a clip."""


def warm(case, optimizer, steps=3):
    """Parameters and optimizer state after a few steps on random gradients."""
    params, state = case.params, optimizer.init(case.params)
    for seed in range(steps):
        grads = tree.scale(0.1, random_like(params, seed))
        params, state = optimizer.update(grads, state, params)
    return params, state


def run_case_step(case, optimizer, one_step, *, batches=None, warm_steps=3):
    """One step and its hypergradient from a warm point, always with the same random numbers."""
    params, state = warm(case, optimizer, warm_steps)
    torch.manual_seed(11)
    return run_step(
        one_step,
        case.problem,
        optimizer,
        params,
        case.upper_params,
        state,
        [case.batch] if batches is None else batches,
        case.upper_batch,
    )


def assert_matches_differences(case, optimizer, hypergradient, tolerance=1e-6):
    """The hypergradient of ``run_case_step`` is the slope of the upper loss after the step."""
    params, state = warm(case, optimizer)
    torch.manual_seed(11)
    function = upper_after_step(
        case.problem,
        optimizer,
        params,
        state,
        case.batch,
        case.upper_batch,
        torch.get_rng_state(),
        at=case.upper_params,
    )
    for seed in (0, 1):
        direction = random_like(case.upper_params, seed)
        expected = slope(function, case.upper_params, direction)
        found = float(tree.vdot(hypergradient, direction))
        assert abs(found - expected) <= tolerance * max(abs(expected), 1e-3)


def batches_of(case):
    """Other examples in every step, in one or two micro-batches of unequal size."""
    pieces = ([[0, 1, 2, 3, 4]], [[1, 2, 3]], [[3, 4], [0, 1, 2]])
    return [[pick(case.batch, rows) for rows in step] for step in pieces]


def run_case_window(case, optimizer, method, *, batches=None, point=None):
    """A window and its hypergradient from a warm point, always with the same random numbers."""
    params, state = warm(case, optimizer) if point is None else point
    torch.manual_seed(11)
    return run_window(
        method,
        case.problem,
        optimizer,
        params,
        case.upper_params,
        state,
        batches_of(case) if batches is None else batches,
        case.upper_batch,
    )
