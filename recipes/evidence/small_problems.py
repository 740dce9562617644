"""The cost of a window on a small problem: ``python -m recipes.evidence.small_problems``.

A network of 1,761 parameters is fitted to sines (the regression of MAML, with a weight per
example). There the time is that of starting operations, not of their arithmetic. A window of K
steps of SGD is differentiated by hand (a loop with ``torch.autograd.grad``), by TorchOpt and by
``BilevelSolver``, in turns, on one thread; the figures are processor time. All of them compute the
same hypergradient, which is checked first. Written to ``results/small_problems.json``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchopt
from torch import Tensor
from torch.nn.functional import linear

from bilevel import SGD, BilevelProblem, BilevelSolver, OneStep, Unrolled
from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json

Params = dict[str, Tensor]
Window = Callable[[], Tensor]

LR = 0.1
WIDTHS = (1, 40, 40, 1)


def network(seed: int) -> Params:
    """Return parameters of a network with two hidden layers of 40."""
    generator = torch.Generator().manual_seed(seed)
    params: Params = {}
    for number, (fan_in, fan_out) in enumerate(pairwise(WIDTHS)):
        params[f"{number}.weight"] = torch.randn(fan_out, fan_in, generator=generator)
        params[f"{number}.weight"] /= fan_in**0.5
        params[f"{number}.bias"] = torch.zeros(fan_out)
    return params


def outputs(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Return the network's outputs, [points]."""
    x = torch.tanh(linear(x, params["0.weight"], params["0.bias"]))
    x = torch.tanh(linear(x, params["1.weight"], params["1.bias"]))
    return linear(x, params["2.weight"], params["2.bias"])[:, 0]


def lower_loss(params: Params, upper: Params, x: Tensor) -> Tensor:
    """Return the weighted mean squared error."""
    errors = (outputs(params, x) - x[:, 0].sin()).square()
    return (upper["logits"].sigmoid() * errors).mean()


def upper_loss(params: Params, upper: Params, x: Tensor) -> Tensor:
    """Return the mean squared error."""
    return (outputs(params, x) - x[:, 0].sin()).square().mean()


def by_hand(params: Params, logits: Tensor, x: Tensor, held_out: Tensor, steps: int) -> Tensor:
    """Return the new logits after a window and a step along its hypergradient."""
    upper = {"logits": logits.detach().requires_grad_()}
    lower = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    for _ in range(steps):
        loss = lower_loss(lower, upper, x)
        grads = torch.autograd.grad(loss, list(lower.values()), create_graph=True)
        pairs = zip(lower.items(), grads, strict=True)
        lower = {name: leaf - LR * grad for (name, leaf), grad in pairs}
    (found,) = torch.autograd.grad(upper_loss(lower, upper, held_out), [upper["logits"]])
    return logits - LR * found


def by_torchopt(params: Params, logits: Tensor, x: Tensor, held_out: Tensor, steps: int) -> Tensor:
    """Return the same by TorchOpt's functional SGD."""
    optimizer = torchopt.sgd(lr=LR)
    upper = {"logits": logits.detach().requires_grad_()}
    names = list(params)
    lower = tuple(leaf.detach().requires_grad_() for leaf in params.values())
    state = optimizer.init(lower)
    for _ in range(steps):
        loss = lower_loss(dict(zip(names, lower, strict=True)), upper, x)
        grads = torch.autograd.grad(loss, lower, create_graph=True)
        updates, state = optimizer.update(grads, state, params=lower, inplace=False)
        lower = torchopt.apply_updates(lower, updates, inplace=False)
    loss = upper_loss(dict(zip(names, lower, strict=True)), upper, held_out)
    (found,) = torch.autograd.grad(loss, [upper["logits"]])
    return logits - LR * found


def windows(steps: int) -> dict[str, Window]:
    """Return the ways to take a window, each a function that returns the new logits."""
    params, logits = network(0), torch.linspace(-1.0, 1.0, 10)
    generator = torch.Generator().manual_seed(1)
    x, held_out = (6.0 * torch.rand(10, 1, generator=generator) - 3.0 for _ in range(2))
    problem: BilevelProblem[Params, Params, Tensor] = BilevelProblem(lower_loss, upper_loss)

    def solved(method: OneStep | Unrolled) -> Window:
        solver = BilevelSolver(problem, SGD(LR), SGD(LR), method, unroll_steps=steps)
        state = solver.init(params, {"logits": logits})
        return lambda: solver.advance(state, [[x]] * steps, held_out)[0].upper_params["logits"]

    found: dict[str, Window] = {
        "by hand": lambda: by_hand(params, logits, x, held_out, steps),
        "TorchOpt": lambda: by_torchopt(params, logits, x, held_out, steps),
        "Unrolled()": solved(Unrolled()),
    }
    return found | {"OneStep()": solved(OneStep())} if steps == 1 else found


def measure(steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return for each way the milliseconds of a window and their ratio to those by hand.

    The ratio is the median of the ratios within a round, in which all ways take their turn.
    """
    ways = windows(steps)
    expected = ways["by hand"]()
    for way in ways.values():
        torch.testing.assert_close(way(), expected, rtol=1e-5, atol=1e-7)
    calls = max(1, 16 // steps)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            for _ in range(calls):
                way()
            times[name].append(1000.0 * (time.process_time() - started) / calls)
    hand = np.array(times["by hand"])
    return {
        name: {
            "ms": round(float(np.median(values)), 3),
            "times_by_hand": round(float(np.median(np.array(values) / hand)), 2),
        }
        for name, values in times.items()
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the file."""
    parser = argparse.ArgumentParser(prog="python -m recipes.evidence.small_problems")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("results/small_problems.json"))
    given = parser.parse_args(words)
    check_writable("--output", given.output)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for steps in (1, 8):
        rows = measure(steps, given.rounds)
        found[f"{steps} steps"] = rows
        for name, row in rows.items():
            print(
                f"K = {steps}  {name:12}{row['ms']:8.2f} ms {row['times_by_hand']:6.2f} x by hand"
            )
    write_json(given.output, {"parameters": 1761, "rounds": given.rounds, "windows": found})


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.small_problems", main))
