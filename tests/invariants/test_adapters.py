"""Instance weights learned through adapters alone: the same products, for few parameters."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest

from bilevel import Auto, Ghost, Jvp, OneStep, PerExample, tree
from prm.models.adapters import add_lora
from tests.invariants.families import warm
from tests.invariants.setting import by_loop, by_route, distance
from tests.prm.tiny import FORWARD_MODE, in_float64, internvl, save_image


@FORWARD_MODE
@pytest.mark.skipif(find_spec("peft") is None, reason="LoRA needs the extra 'peft'")
@pytest.mark.parametrize("order", ["upper-first", "lower-first"])
def test_routes_equal_a_loop_over_examples(tmp_path, monkeypatch, order):
    wide = save_image(tmp_path / "wide.png", 100, 60, seed=1)
    tall = save_image(tmp_path / "tall.png", 50, 200, seed=2)
    prm = in_float64(internvl(), monkeypatch)
    lower = add_lora(prm.model, rank=2, freeze=["multi_modal_projector"])
    setup = warm(prm, wide, tall, lower)
    assert setup.lower.keys() == lower.keys()
    expected = by_loop(setup, order)
    assert float(tree.norm(expected)) > 1e-8
    for route in (Ghost() if order == "upper-first" else PerExample(), Auto(), Jvp()):
        assert distance(by_route(setup, OneStep(route, order)), expected) < 1e-9, route
    less = replace(setup.objective, prm=replace(prm, activation_checkpointing=True))
    found = by_route(replace(setup, objective=less), OneStep(Auto(), order))
    assert distance(found, expected) < 1e-9
