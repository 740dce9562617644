"""Verdicts on rows of known figures."""

from __future__ import annotations

import pytest

from recipes.evidence.gpu.case import Case
from recipes.evidence.gpu.targets import Target, agreements, targets

H100 = "NVIDIA H100 80GB HBM3"


def row(measure, contender, precision="bf16", status="measured", cap=None, **figures):
    one = Case(measure, contender, precision, cap=cap)
    return one.as_row() | {"status": status} | figures


ROWS = [
    row("step", "floor", seconds=0.2),
    row("step", "original", seconds=1.5),
    row("step", "dot", seconds=0.25),
    row("step", "dot", "bf16-pure", seconds=9.0),
    row("launches", "passes", launches=5000),
    row("launches", "dot", launches=5200),
    row("cap", "dot", cap=24.0),
    row("cap", "dot", cap=16.0, status="out of memory"),
    row("agreement", "dot", "float32", hypergradients=[1.0, -1.0]),
    row("agreement", "dot, upper-first", "float32", hypergradients=[1.0, 0.0]),
    row("agreement", "dot", "bf16", hypergradients=[2.0, -2.0]),
    row("agreement", "ghost", "bf16", hypergradients=[0.0, -2.0]),
    row("agreement", "original", "bf16", hypergradients=[0.0, -2.0]),
]


def found(rows=ROWS, size="full", card=H100):
    return {one.name: (one.found, one.verdict) for one in targets(rows, size, card)}


def test_figures_and_verdicts():
    judged = found()
    assert judged == {
        "times faster than the original": (pytest.approx(6.0), "met"),
        "times the floor": (pytest.approx(1.25), "missed"),
        "full fine-tuning in 24 GB (1: yes)": (1.0, "met"),
        "cosine to float32": (pytest.approx(1.0), "met"),
        "seconds of an iteration on an H100": (0.25, "met"),
        "launches beyond the model's own": (200, "met"),
    }


def test_seconds_are_judged_on_their_card_alone():
    judged = found(card="NVIDIA A100-SXM4-80GB")
    assert judged["seconds of an iteration on an H100"] == (0.25, "not measured")
    assert judged["times the floor"][1] == "missed"


@pytest.mark.parametrize(("size", "card"), [("tiny", None), ("full", None), ("tiny", H100)])
def test_nothing_is_judged_of_another_job(size, card):
    assert {verdict for _, verdict in found(size=size, card=card).values()} == {"not measured"}


def test_what_was_not_measured_is_neither_met_nor_missed():
    assert set(found([]).values()) == {(None, "not measured")}


def test_out_of_memory_misses_the_target_and_a_cut_row_does_not():
    name = "full fine-tuning in 24 GB (1: yes)"
    assert found([row("cap", "dot", cap=24.0, status="out of memory")])[name] == (0.0, "missed")
    assert found([row("cap", "dot", cap=24.0, status="cut")])[name] == (None, "not measured")


def test_agreement_is_with_the_same_quantity():
    by_contender = {one["contender"]: one for one in agreements(ROWS)}
    assert by_contender.keys() == {"dot", "ghost"}  # the original's reference is not there
    assert by_contender["ghost"]["reference"] == "dot, upper-first"
    assert by_contender["ghost"]["cosine"] == 0.0
    assert by_contender["ghost"]["sign_agreement"] == 0.0
    assert by_contender["dot"]["cosine"] == pytest.approx(1.0)


def test_bounds_belong_to_what_is_met():
    assert Target("a", 5.0, True, 5.0).verdict == "met"
    assert Target("a", 5.0, False, 5.0).verdict == "met"
    assert Target("a", 5.0, False, 5.1).verdict == "missed"
    assert Target("a", 5.0, True, 5.1).as_row()["bound"] == ">= 5"
