"""Kept activations of frozen layers: the same hypergradients on every route."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bilevel import CentralDifference, Ghost, Jvp, OneStep, PerExample, Reverse
from prm.activations.batches import FrozenFront
from prm.activations.stores import MemoryStore
from prm.models.boundary import find_boundary
from prm.models.model import split_parameters
from tests.invariants.families import FAMILIES, warm
from tests.invariants.setting import by_route, distance
from tests.prm.tiny import FORWARD_MODE, in_float64, save_image

VISION = {"internvl": ("vision_tower", "multi_modal_projector"), "qwen2-vl": ("visual",)}
FRONTS = [
    ("llama", ("embed_tokens", "layers.0")),
    ("internvl", (*VISION["internvl"], "embed_tokens", "layers.0")),
    ("internvl", VISION["internvl"]),
    ("internvl", ("vision_tower",)),
    ("qwen2-vl", (*VISION["qwen2-vl"], "embed_tokens", "layers.0")),
    ("qwen2-vl", VISION["qwen2-vl"]),
]


@pytest.fixture(scope="module", params=FRONTS, ids=lambda front: f"{front[0]}, {len(front[1])}")
def both(request, tmp_path_factory):
    """The same point with and without kept activations in the batches of both levels."""
    family, freeze = request.param
    folder = tmp_path_factory.mktemp("images")
    wide = save_image(folder / "wide.png", 100, 60, seed=1)
    tall = save_image(folder / "tall.png", 50, 200, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        prm = in_float64(FAMILIES[family](), patch)
        trained, _ = split_parameters(prm.model, freeze)
        plain = warm(prm, wide, tall, trained)
        bounded = replace(prm, boundary=find_boundary(prm.model, trained))
        front = FrozenFront(bounded, MemoryStore(10**9))
        yield (
            plain,
            replace(
                plain,
                objective=replace(plain.objective, prm=bounded),
                batch=front(plain.batch),
                meta=front(plain.meta),
            ),
        )


@FORWARD_MODE
@pytest.mark.parametrize(
    ("route", "order", "error"),
    [
        (Ghost(), "upper-first", 1e-12),
        (PerExample(), "lower-first", 1e-12),
        (Jvp(), "lower-first", 1e-12),
        (Reverse(), "lower-first", 1e-12),
        (CentralDifference(1e-5), "lower-first", 1e-8),  # a difference of rounded losses
    ],
)
def test_hypergradients_are_the_same(both, route, order, error):
    plain, kept = both
    assert "frozen_states" in kept.batch.keys() & kept.meta.keys()
    expected = by_route(plain, OneStep(route, order))
    found = by_route(kept, OneStep(route, order))
    assert distance(found, expected) < error
