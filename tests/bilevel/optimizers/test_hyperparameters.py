"""What a loss after a step owes to learning rates, decays and betas: central differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.optimizers.optimizers import SGD, AdamW
from bilevel.optimizers.schedule import Constant
from tests.bilevel.optimizers.draws import CLIPS, EARLIER_STEPS, OPTIMIZERS, draw, warm_state


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def numbers(optimizer):
    """Its hyperparameters as tensors, those of groups by name, the betas as one tensor."""
    names = ("lr", "weight_decay", *optimizer._learnable)
    values = {name: getattr(optimizer, name) for name in names}
    if values.get("momentum") == 0.0:
        del values["momentum"]
    return {
        name: tree.map(number, v) if isinstance(v, dict) else number(v)
        for name, v in values.items()
    }


@pytest.mark.parametrize("clip", ["unclipped", "held"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("cold", [False, True])
def test_the_derivative_is_a_central_difference(name, clip, cold) -> None:
    optimizer = replace(OPTIMIZERS[name], **CLIPS[clip])
    if optimizer.weight_decay == 0.0:
        optimizer = replace(optimizer, weight_decay=0.05)  # so that there is a smaller one
    grads, params, params_bar = draw(1), draw(2), draw(3)
    state = optimizer.init(params)
    if not cold:
        state = warm_state(optimizer, steps=EARLIER_STEPS.get(name, 4))
        grads["a"][0] = 0.0
    state_bar = warm_state(optimizer, seed=20)
    values = numbers(optimizer)
    found = optimizer.hyperparameters_vjp(values, grads, state, params, params_bar, state_bar)

    def objective(changed) -> float:
        other = optimizer.with_hyperparameters(changed)
        new_params, new_state = other.update(grads, state, params)
        total = tree.vdot(params_bar, new_params) + tree.vdot(state_bar[1:], new_state[1:])
        return total.item()

    assert tree.names(found) == tree.names(values)
    for path, leaf in tree.flatten(values).items():
        for index in range(leaf.numel()):
            ends = []
            for sign in (1.0, -1.0):
                moved = {key: one.clone() for key, one in tree.flatten(values).items()}
                moved[path].view(-1)[index] += sign * 1e-6
                ends.append(objective(tree.unflatten(moved, values)))
            expected = (ends[0] - ends[1]) / 2e-6
            assert tree.flatten(found)[path].view(-1)[index].item() == pytest.approx(
                expected, rel=1e-7, abs=1e-8
            ), f"{path}[{index}]"


def test_without_a_cotangent_of_the_state_it_counts_as_zero() -> None:
    optimizer, state = OPTIMIZERS["adamw"], warm_state(OPTIMIZERS["adamw"])
    values, point = numbers(optimizer), (draw(1), state, draw(2), draw(3))
    zeros = tree.zeros_like(warm_state(optimizer, seed=20))
    for one, other in zip(
        tree.leaves(optimizer.hyperparameters_vjp(values, *point)),
        tree.leaves(optimizer.hyperparameters_vjp(values, *point, zeros)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_one_rate_for_all_groups_collects_the_cotangents_of_all() -> None:
    optimizer = OPTIMIZERS["groups"]
    point = (draw(1), warm_state(optimizer), draw(2), draw(3))
    both = optimizer.hyperparameters_vjp(numbers(optimizer), *point)["lr"]
    one = optimizer.hyperparameters_vjp({"lr": number(0.1)}, *point)["lr"]
    assert one.item() == pytest.approx(sum(bar.item() for bar in both.values()), rel=1e-14)


def test_leaves_without_a_gradient_owe_nothing() -> None:
    optimizer, params = OPTIMIZERS["adam"], draw(2)
    frozen = tree.map(lambda _: None, params)
    found = optimizer.hyperparameters_vjp(
        numbers(optimizer), frozen, warm_state(optimizer), params, draw(3)
    )
    assert [leaf.tolist() for leaf in tree.leaves(found)] == [[0.0, 0.0], 0.0, 0.0]


@pytest.mark.parametrize(
    ("optimizer", "values", "message"),
    [
        (AdamW(0.1), {"eps": number(1e-8)}, r"AdamW: expected .*'betas'\], found 'eps'"),
        (SGD(Constant(0.1)), {"lr": number(0.1)}, r"SGD: lr is a schedule.*give a number"),
        (AdamW(0.1), {"lr": number(-0.1)}, r"AdamW: lr must lie in \[0, inf\), got -0.1"),
    ],
)
def test_values_that_an_optimizer_cannot_take_are_refused(optimizer, values, message) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer.with_hyperparameters(values)


def test_a_momentum_of_zero_has_no_buffer_to_learn_from() -> None:
    params = draw(2)
    values = {"momentum": number(0.0)}
    with pytest.raises(ValueError, match=r"SGD: momentum is 0.*start a learned momentum above 0"):
        SGD(0.1).hyperparameters_vjp(values, draw(1), SGD(0.1).init(params), params, draw(3))
