"""Steps on tensors without values, on the pretend device: forward mode, which it has no values for.

torch ends with a segmentation fault where forward mode meets a tensor subclass that computes on the
CPU and claims a device (``tests.accelerator``). Fake tensors, which have a shape and a device and
nothing else, are torch's own, and forward mode takes them. An operation on two devices is an error
(``FakeTensorDeviceMismatchError``). What reads a value gets 1 for it, and is noted with its place.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel import (
    Adam,
    AdamW,
    BilevelSolver,
    Implicit,
    Jvp,
    OneStep,
    StationarityWarning,
    Unrolled,
)
from bilevel.lower.guard import LOOKS, Guard, Late
from prm.placement import Placement
from recipes.models.loading import load_model
from recipes.train.batches import lower_draw, meta_batch, train_batch, upper_draw
from recipes.train.data import read_train_data
from recipes.train.training import _objective
from tests.accelerator import NAME, _cause, device
from tests.tiny_task import Task

_READ = torch.ops.aten._local_scalar_dense.default
_EQUAL = torch.ops.aten.equal.default


class Faked(TorchDispatchMode):
    """Computes on the device without values, and on the CPU as ever; notes where values are read.

    Attributes:
        places: How often a value was read, by the place in the project.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = [one for one in tree_leaves((args, kwargs)) if isinstance(one, FakeTensor)]
        if there and func in (_READ, _EQUAL):
            self.places[_cause(sys._getframe(1))[0]] += 1
            if func is _EQUAL or there[0].dtype == torch.bool:
                return True
            return 1.0 if there[0].is_floating_point() else 1
        to = kwargs.get("device")
        if there or (to is not None and torch.device(to).type == NAME):
            with self._fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def fake(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape on the pretend device."""
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=device())


def fake_module(module: nn.Module) -> None:
    """Move a module there; its values are lost."""
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = known.setdefault(
                    id(parameter), nn.Parameter(fake(parameter), requires_grad=False)
                )
                part._parameters[name] = made
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer)


SOLVERS: dict[str, Any] = {
    "jvp": (OneStep(Jvp()), 1),
    "jvp upper-first": (OneStep(Jvp(), order="upper-first", direction_decay=0.5), 1),
    "unrolled": (Unrolled(), 2),
    "implicit": (Implicit(), 2),
}
"""Hypergradients by forward mode, and the lower steps that they go through."""


def run(task: Task) -> dict[str, Any]:
    """Take a window by each solver, and one that mixes devices.

    Returns:
        By name ``{"error": None or text, "waits": {place: times}}``; ``NAME late`` is by a guard
        that does not look.
    """
    options = task.train(Path("unused"), weighting="table", bound="clip", normalise="table")
    prm, _ = load_model(options, options.lower.freeze, options.init_from, Placement())
    data = read_train_data(prm, options)
    objective = _objective(options, prm, data)
    draws = lower_draw(options, range(len(data.train))), upper_draw(options, data.meta)
    batches = train_batch(draws[0], data.train, {})(0), meta_batch(draws[1], data.meta)(0)
    initial = objective.weighting.init(torch.Generator())
    problem, found = objective.problem(), {}
    with Faked() as faked:
        fake_module(prm.model)
        lower, upper = ({name: fake(one) for name, one in batch.items()} for batch in batches)
        theta = {
            name: fake(parameter)
            for name, parameter in prm.model.named_parameters()
            if "vision" not in name
        }
        phi = {name: fake(leaf) for name, leaf in initial.items()}

        def window(name: str, problem: Any, guard: Guard) -> None:
            method, count = SOLVERS[name.removesuffix(" late").removesuffix(" mixed up")]
            optimizers = AdamW(1e-3, max_norm=1.0, weight_decay=0.0), Adam(1e-2)
            solver = BilevelSolver(problem, *optimizers, method, unroll_steps=count)
            state = solver.init(theta, phi)
            faked.places.clear()
            error = None
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", StationarityWarning)
                    solver.advance(state, [[lower]] * count, upper, guard=guard)
            except Exception:
                error = traceback.format_exc()
            found[name] = {"error": error, "waits": dict(faked.places)}

        def mixed(*arguments: Any) -> Any:
            losses, features = objective.per_example_loss(*arguments)
            return losses * torch.ones(len(losses)), features  # on the CPU

        for name in SOLVERS:
            window(name, problem, LOOKS)
            window(f"{name} mixed up", replace(problem, per_example_loss=mixed), LOOKS)
            usual = torch.ones((), dtype=torch.bool, device=device())
            window(f"{name} late", problem, Late(usual))
    return found
