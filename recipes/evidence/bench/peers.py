"""The hypergradients of other libraries on the same case.

- ``torchopt_unroll``: TorchOpt's differentiable optimizer with the graph of all steps, as in its
  documentation. higher and MetaOptimizer work in the same way.
- ``darts_in_place``: the operations of Betty's ``darts`` on the parameters, written out.
- ``betty_engine``: Betty itself (0.2.1), if it is installed.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any, cast

import optree
import torch
import torchopt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchopt.transform.scale_by_adam import ScaleByAdamState

from bilevel import tree
from recipes.evidence.bench.case import LR, Case, plain_step, plain_upper_gradient


def torchopt_unroll(case: Case, steps: int) -> Tensor:
    """Return dL_upper/dφ by double backward through ``steps`` AdamW steps of TorchOpt.

    Attention uses its MATH kernel, the only one with a second derivative. TorchOpt counts steps in
    integers and corrects its moments in float32. Here the count is float64, so that the result can
    be compared in float64.
    """
    rule = case.optimizer
    optimizer = torchopt.adamw(LR, rule.betas, rule.eps, rule.weight_decay)
    adam, *others = optimizer.init(case.lower)
    moments = [
        optree.tree_unflatten(optree.tree_structure(old), tree.leaves(new))
        for old, new in zip(adam[:2], case.state[1:], strict=True)
    ]
    count = tree.map(lambda _: case.state.steps.to(torch.float64), adam.count)
    state = (ScaleByAdamState(*moments, count), *others)
    params = {name: leaf.detach().requires_grad_() for name, leaf in case.lower.items()}
    raw = case.upper["raw"].detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        for batch in case.batches[:steps]:
            loss = case.problem.lower_loss(params, {"raw": raw}, batch)
            leaf_grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            grads = dict(zip(params, leaf_grads, strict=True))
            updates, state = optimizer.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
    loss = case.upper_loss(params, {"raw": raw}, case.upper_batch)
    return torch.autograd.grad(loss, raw)[0]


def darts_in_place(case: Case, radius: float = 0.01) -> tuple[Tensor, float]:
    """Return Betty's finite difference, and the share of entries of θ that it did not restore.

    After a lower step, v = ∇L_upper at the new parameters θ'. Then, on the same lower batch::

        θ' += ε v,  −∂φ L →,  θ' −= 2 ε v,  ∂φ L →,  θ' += ε v        ε = radius / ‖v‖
        h = (∂φ L(θ' − ε v) − ∂φ L(θ' + ε v)) / 2 ε

    in the precision of the parameters. The learning rate and the derivative of the optimizer are
    not part of it.
    Source: betty/hypergradient/darts.py (arXiv 2207.02849).
    """
    lower, _ = plain_step(case, case.lower, case.state, case.batches[:1])
    direction = plain_upper_gradient(case, lower)
    epsilon = radius / float(tree.norm(direction) + 1e-15)
    before = {name: leaf.clone() for name, leaf in lower.items()}
    leaves = {name: leaf.requires_grad_() for name, leaf in lower.items()}

    def shift(alpha: float) -> None:
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.add_(direction[name], alpha=alpha)

    def upper_part() -> Tensor:
        raw = case.upper["raw"].detach().requires_grad_()
        loss = case.problem.lower_loss(leaves, {"raw": raw}, case.batches[0])
        return torch.autograd.grad(loss, raw)[0]

    shift(epsilon)
    ahead = upper_part()
    shift(-2.0 * epsilon)
    behind = upper_part()
    shift(epsilon)
    moved = sum(int((before[name] != leaf).sum()) for name, leaf in leaves.items())
    entries = sum(leaf.numel() for leaf in leaves.values())
    return (behind - ahead) / (2.0 * epsilon), moved / entries


def darts_limit(case: Case) -> Tensor:
    """Return the limit of ``darts_in_place`` for radius → 0, ``−∂²L/∂φ∂θ(θ') v``."""
    lower, _ = plain_step(case, case.lower, case.state, case.batches[:1])
    direction = plain_upper_gradient(case, lower)
    leaves = {name: leaf.requires_grad_() for name, leaf in lower.items()}
    raw = case.upper["raw"].detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        loss = case.problem.lower_loss(leaves, {"raw": raw}, case.batches[0])
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        product = torch.autograd.grad(grads, raw, list(direction.values()))[0]
    return -product


def betty_engine(case: Case) -> Callable[[], Tensor] | None:
    """Return a function that runs one iteration of Betty's engine, or None if it is missing.

    The first call starts from the case, and later ones continue from the last state. Betty rebuilds
    the optimizer and cannot rebuild torch's AdamW (``unexpected keyword argument
    'decoupled_weight_decay'``), so it gets Adam without decay. Its hypergradient depends on the
    optimizer through θ' alone.
    """
    try:
        implicit: Any = importlib.import_module("betty.problems").ImplicitProblem
    except ModuleNotFoundError:
        return None
    configs = importlib.import_module("betty.configs")
    engine = importlib.import_module("betty.engine")
    hypergradient: list[Tensor] = []

    class Lower(implicit):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Tensor:
            params = dict(self.module.named_parameters())
            losses, _ = case.problem.per_example_loss(params, batch)
            weights: Tensor = self.upper(batch["instance"])
            return (weights * losses).mean()

    class Upper(implicit):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Tensor:
            params = dict(self.lower.module.named_parameters())
            return case.upper_loss(params, {}, batch)

        def grad_callback(self) -> None:
            hypergradient[:] = [self.module.raw.grad.clone()]

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(case.upper["raw"].clone())

        def forward(self, instance: Tensor) -> Tensor:
            return 2.0 * torch.sigmoid(self.raw[instance])

    module, table = _copied(case), Table()
    rule = case.optimizer
    adam = torch.optim.Adam(module.parameters(), lr=LR, betas=rule.betas, eps=rule.eps)
    lower = Lower(
        name="lower",
        config=configs.Config(type="darts", unroll_steps=1),
        module=module,
        optimizer=adam,
        train_data_loader=[case.batches[0]],
    )
    upper = Upper(
        name="upper",
        config=configs.Config(type="darts", retain_graph=True),
        module=table,
        optimizer=torch.optim.SGD(table.parameters(), lr=0.0),
        train_data_loader=[case.upper_batch],
    )
    logging.disable(logging.INFO)
    try:
        running = engine.Engine(
            problems=[upper, lower],
            config=configs.EngineConfig(train_iters=1, strategy="cpu"),
            dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
        )
    finally:
        logging.disable(logging.NOTSET)
    _put_state(case, module, lower.optimizer)

    def iteration() -> Tensor:
        running.train_step()
        return hypergradient[0]

    return iteration


def torch_floor(case: Case) -> Callable[[], None]:
    """Return a function that takes a lower step with torch's AdamW and an upper gradient."""
    module = _copied(case)
    rule = case.optimizer
    adamw = torch.optim.AdamW(
        module.parameters(),
        lr=LR,
        betas=rule.betas,
        eps=rule.eps,
        weight_decay=cast("float", rule.weight_decay),
    )
    _put_state(case, module, adamw)

    def iteration() -> None:
        params = dict(module.named_parameters())
        case.problem.lower_loss(params, case.upper, case.batches[0]).backward()
        adamw.step()
        adamw.zero_grad()
        loss = case.upper_loss(params, case.upper, case.upper_batch)
        torch.autograd.grad(loss, list(params.values()))

    return iteration


def _copied(case: Case) -> nn.Module:
    module = type(case.model)(case.sizes).to(case.dtype)
    module.load_state_dict(case.lower)
    return module


def _put_state(case: Case, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    _, first, second = case.state
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    for name, parameter in module.named_parameters():
        optimizer.state[parameter] = {
            "step": case.state.steps.to(torch.float32),
            "exp_avg": first[name].clone(),
            "exp_avg_sq": second[name].clone(),
        }
