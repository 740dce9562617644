"""Parameters in float32, the body of the model in bfloat16 (`PRM.autocast`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from bilevel import CentralDifference, Ghost, Jvp, OneStep, tree
from prm.models.model import step_logits
from tests.invariants.setting import by_loop, by_route, distance
from tests.prm.tiny import FORWARD_MODE

KINDS = pytest.mark.parametrize("setup", ["internvl", "qwen2-vl"], indirect=True)


def narrow(values):
    return tree.map(lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, values)


@pytest.fixture
def single(setup):
    """The setting in float32."""
    prm = setup.objective.prm
    prm.model.float()
    yield replace(
        setup,
        lower=narrow(setup.lower),
        state=narrow(setup.state),
        upper=narrow(setup.upper),
        batch=narrow(setup.batch),
        meta=narrow(setup.meta),
    )
    prm.model.double()


def in_bfloat16(single):
    prm = replace(single.objective.prm, autocast=torch.bfloat16)
    return replace(single, objective=replace(single.objective, prm=prm))


@KINDS
def test_parameters_gradients_and_head_stay_in_float32(single):
    prm = in_bfloat16(single).objective.prm
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in single.lower.items()}
    seen = {}
    body = prm.model.model.language_model.layers[0].mlp.down_proj
    hooks = [
        body.register_forward_hook(lambda _, inputs, output: seen.update(body=output.dtype)),
        prm.model.lm_head.register_forward_hook(
            lambda _, inputs, output: seen.update(hidden=inputs[0].detach(), logits=output.detach())
        ),
    ]
    logits = step_logits(prm, leaves, single.batch)
    for hook in hooks:
        hook.remove()
    assert seen["body"] == torch.bfloat16
    assert seen["hidden"].dtype == seen["logits"].dtype == logits.dtype == torch.float32
    expected = functional.linear(seen["hidden"], single.lower["lm_head.weight"])
    torch.testing.assert_close(seen["logits"], expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(seen["logits"].bfloat16().float(), seen["logits"])
    found = torch.autograd.grad(logits.sum(), leaves.values(), allow_unused=True)
    assert {grad.dtype for grad in found if grad is not None} == {torch.float32}


@FORWARD_MODE
@KINDS
def test_hypergradients_differ_by_the_rounding_of_bfloat16(single):
    """3 significant digits per operation; through these models, of large random weights, 10 %."""
    exact = by_loop(single, "upper-first")
    mixed = in_bfloat16(single)
    assert distance(by_loop(mixed, "upper-first"), exact) < 0.1
    for route in (Ghost(), CentralDifference()):
        assert distance(by_route(mixed, OneStep(route, "upper-first")), exact) < 0.1
    assert distance(by_route(mixed, OneStep(Jvp(), "upper-first")), exact) < 0.2
