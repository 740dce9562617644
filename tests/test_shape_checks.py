"""The checks of shapes see what they should, and leave alone what states none."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from tests import shape_checks

MODULE = """
from __future__ import annotations
from dataclasses import dataclass
from jaxtyping import Float, Int
from torch import Tensor, no_grad

Losses = Float[Tensor, " batch"]

def weighted(losses: Losses, weights: Losses, factor: float = 1.0) -> Float[Tensor, ""]:
    return (losses * weights * factor).mean()

def wrong(losses: Losses) -> Float[Tensor, ""]:
    return losses

def plain(losses: Tensor) -> int:
    return losses

class Table:
    def rows(self, index: Int[Tensor, " rows"]) -> Float[Tensor, "rows 2"] | None:
        return None if not len(index) else index[:, None].expand(-1, 2).double()

    @no_grad()
    def guarded(self, losses: Losses) -> Losses:
        return losses

    @staticmethod
    def fixed(losses: Losses) -> Losses:
        return losses

    @classmethod
    def made(cls, losses: Losses) -> Losses:
        return losses
"""


@pytest.fixture
def shaped(tmp_path, monkeypatch):
    (tmp_path / "stating_shapes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    shape_checks.install("stating_shapes")
    yield importlib.import_module("stating_shapes")
    del sys.modules["stating_shapes"]


def test_right_shapes_pass(shaped):
    losses = torch.tensor([1.0, 3.0])
    assert shaped.weighted(losses, losses, 2).item() == 10.0
    assert shaped.plain(losses) is losses
    table = shaped.Table()
    assert table.rows(torch.tensor([1, 2])).shape == (2, 2)
    assert table.rows(torch.tensor([], dtype=torch.int64)) is None
    for method in (table.guarded, table.fixed, table.made):
        assert method(losses) is losses


def test_wrong_shapes_are_found(shaped):
    with pytest.raises(TypeCheckError, match="weights"):
        shaped.weighted(torch.ones(2), torch.ones(3))
    with pytest.raises(TypeCheckError, match="losses"):
        shaped.weighted(torch.ones(2, dtype=torch.int64), torch.ones(2))
    with pytest.raises(TypeCheckError, match="return value"):
        shaped.wrong(torch.ones(2))
    table = shaped.Table()
    with pytest.raises(TypeCheckError, match="index"):
        table.rows(torch.ones(2))
    for method in (table.guarded, table.fixed, table.made):
        with pytest.raises(TypeCheckError, match="losses"):
            method(torch.ones(2, 2))


def test_the_packages_are_checked():
    """By the conftest, before anything was imported from them."""
    from bilevel.optimizers.base import clip_scale

    with pytest.raises(TypeCheckError, match="norm"):
        clip_scale(torch.ones(2), 1.0)
