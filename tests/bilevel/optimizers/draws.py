"""Optimizers with all their parts in use, and points at which their steps are differentiated."""

from __future__ import annotations

import torch

from bilevel import tree
from bilevel.optimizers.base import OptimizerState
from bilevel.optimizers.optimizers import SGD, Adagrad, Adam, AdamW, RMSProp
from bilevel.optimizers.variants import AdaDelta, Adamax, NAdam, RAdam

OPTIMIZERS = {
    "sgd": SGD(0.1, weight_decay=0.3, decay_mask=lambda name: name != "a"),
    "momentum": SGD(0.1, 0.9),
    "nesterov": SGD(0.1, 0.8, nesterov=True, weight_decay=0.2),
    "adam": Adam(0.1, (0.8, 0.95), 1e-2, weight_decay=0.3),
    "adamw": AdamW(0.1, (0.8, 0.95), 1e-2, weight_decay=0.4, decay_mask=lambda name: name != "b"),
    "rmsprop": RMSProp(0.1, beta=0.9, eps=1e-2, weight_decay=0.2),
    "adagrad": Adagrad(0.1, eps=1e-2, weight_decay=0.3, decay_mask=lambda name: name == "b"),
    "nadam": NAdam(0.1, (0.8, 0.95), 1e-2, momentum_decay=0.3, weight_decay=0.3),
    "radam-plain": RAdam(0.1, (0.8, 0.95), 1e-2, weight_decay=0.3),  # ρ = 4.8 at step 5
    "radam-rectified": RAdam(0.1, (0.8, 0.95), 1e-2, weight_decay=0.3),  # 9.2 at step 10
    "adamax": Adamax(0.1, (0.8, 0.95), 1e-2, weight_decay=0.3),
    "adadelta": AdaDelta(0.1, rho=0.8, eps=1e-2, weight_decay=0.3),
    "groups": AdamW(
        {"a": 0.1, "rest": 0.03},
        (0.8, 0.95),
        1e-2,
        weight_decay={"a": 0.4, "rest": 0.1},
        group=lambda name: "a" if name == "a" else "rest",
    ),
}
EARLIER_STEPS = {"radam-rectified": 9}  # 4 for the others
CLIPS = {
    "unclipped": {},
    "inactive": {"max_norm": 1e3},
    "inactive-differentiated": {"max_norm": 1e3, "differentiate_clip": True},
    "held": {"max_norm": 0.7},
    "differentiated": {"max_norm": 0.7, "differentiate_clip": True},
}


def draw(seed: int, *, positive: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2), "b": (4,), "c": ()}
    leaves = {
        name: torch.randn(shape, dtype=torch.float64, generator=generator)
        for name, shape in shapes.items()
    }
    return tree.map(lambda leaf: leaf.abs() + 0.1, leaves) if positive else leaves


def warm_state(optimizer, seed: int = 10, steps: int = 4) -> OptimizerState:
    cold = optimizer.init(draw(0))
    return OptimizerState(
        torch.tensor(steps),
        None if cold.first_moment is None else draw(seed, positive=isinstance(optimizer, AdaDelta)),
        None if cold.second_moment is None else draw(seed + 1, positive=True),
    )
