"""Variants of a case of the zoo: other examples, another precision, no unused parameter."""

from __future__ import annotations

from dataclasses import replace

import torch

from bilevel import tree
from tests.bilevel.zoo import build


def pick(batch, rows):
    """The sub-batch of these examples."""
    inputs = {}
    for name, value in batch["inputs"].items():
        if name == "owner" or name == "tiles":
            owner = batch["inputs"]["owner"]
            keep = torch.cat([(owner == row).nonzero().squeeze(1) for row in rows])
            inputs[name] = value[keep]
            if name == "owner":
                inputs[name] = inputs[name] - min(rows)
        else:
            inputs[name] = value[rows]
    return {"inputs": inputs, "labels": batch["labels"][rows], "index": batch["index"][rows]}


def cast(case, dtype):
    """θ and the batches in `dtype`, φ in float32 (float64 with float64)."""

    def to(kind):
        def change(value):
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(kind) if floating else value

        return change

    upper = dtype if dtype == torch.float64 else torch.float32
    return replace(
        case,
        params=tree.map(to(dtype), case.params),
        upper_params=tree.map(to(upper), case.upper_params),
        batch=tree.map(to(dtype), case.batch),
        upper_batch=tree.map(to(dtype), case.upper_batch),
    )


def without_unused(case):
    return replace(case, params={k: v for k, v in case.params.items() if k != "unused"})


def build_used(name):
    """A case of the zoo whose every parameter is used; `mlp` has one that is not."""
    case = build(name)
    if name != "mlp":
        return case
    held = {"unused": case.params["unused"]}

    def per_example_loss(lower, batch):
        return case.problem.per_example_loss({**held, **lower}, batch)

    return without_unused(
        replace(case, problem=replace(case.problem, per_example_loss=per_example_loss))
    )
