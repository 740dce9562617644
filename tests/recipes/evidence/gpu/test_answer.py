"""What a case's figures are, on a tiny model on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bilevel import tree
from recipes.evidence.bench.race.model import SHAPES
from recipes.evidence.gpu import answer as answering
from recipes.evidence.gpu import case
from recipes.evidence.gpu.agreement import cosine
from recipes.evidence.gpu.answer import answer, hypergradients
from recipes.evidence.gpu.case import Case
from recipes.evidence.gpu.meter import CpuMeter
from recipes.evidence.gpu.subject import race_at, start

GB = 10**9


@pytest.fixture(scope="module")
def begun():
    return start(SHAPES["tiny"], "cpu")


def found(begun, one):
    return answer(begun, one, CpuMeter(), rounds=1, samples=4)


@pytest.fixture(scope="module")
def along(begun):
    """Hypergradients along five iterations, by contender and precision."""

    def run(contender, precision):
        one = Case("agreement", contender, precision)
        return hypergradients(race_at(begun, one), one, 5)

    known = {}
    return lambda *key: known.setdefault(key, run(*key)) if key not in known else known[key]


def test_every_precision_begins_with_the_same_numbers(begun):
    values = {}
    for precision in ("bf16-pure", "float32", "bf16", "bf16-pure"):
        race = race_at(begun, Case("step", "dot", precision))
        dtypes = {leaf.dtype for leaf in tree.leaves((race.params, race.state[1:]))}
        assert dtypes == {torch.bfloat16 if precision == "bf16-pure" else torch.float32}
        model = race.objective.prm.model
        assert all(
            leaf.data_ptr() == race.params[name].data_ptr()
            for name, leaf in model.named_parameters()
        )
        found = {name: leaf.double() for name, leaf in race.params.items()}
        values = values or found
        assert all(torch.equal(values[name], leaf) for name, leaf in found.items())
        assert tree.norm(race.state[1:]) == 0.0
        race.params["lm_head.weight"].add_(1.0)  # is not there at the next start


def test_the_batch_is_that_of_the_cell(begun):
    race = race_at(begun, Case("step", "dot", tiles=3, positions=7))
    batch = race.batch(2, 0)
    shape = SHAPES["tiny"]
    assert batch["pixel_values"].shape == (6, 3, shape.image, shape.image)
    assert batch["num_patches"].tolist() == [3, 3]
    assert batch["input_ids"].shape == (2, 3 * shape.image_tokens + shape.text)
    assert batch["label_positions"].shape == batch["labels"].shape == (2, 7)
    assert len(set(batch["label_positions"][0].tolist())) == 7


def test_ghost_is_dot_in_float32(along):
    exact = along("dot, upper-first", "float32")
    assert abs(1.0 - cosine(along("ghost", "float32"), exact)) < 1e-6
    assert cosine(along("ghost", "float32"), exact) != cosine(along("jvp", "float32"), exact)


def test_the_originals_difference_is_that_of_its_reference_in_float32(along):
    assert cosine(along("original", "float32"), along("dot, identity", "float32")) > 0.99


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure"])
def test_a_central_difference_in_16_bits_is_far_from_float32(along, precision):
    ours = cosine(along("dot", precision), along("dot", "float32"))
    theirs = cosine(along("original", precision), along("dot, identity", "float32"))
    assert ours > 0.999
    assert theirs < 0.99


def test_a_step_has_its_figures(begun):
    row = found(begun, Case("step", "dot"))
    assert row["status"] == "measured"
    assert row["seconds"] > 0.0
    held = race_at(begun, Case("step", "dot")).held_bytes
    assert row["peak_allocated"] > 4 / 3 * held  # θ and the moments are three copies; g is one more
    assert row["device_seconds"] is row["peak_reserved"] is None


def test_launches_of_the_floor_are_those_of_the_passes_and_an_update(begun):
    passes, floor = (found(begun, Case("launches", one)) for one in (case.PASSES, case.FLOOR))
    # The losses are averaged and the counts of the optimizer go up beside its one fused call.
    assert 1 <= floor["launches"] - passes["launches"] <= 20
    assert floor.keys() == passes.keys() == {"status", "launches", "copies", "reads", "waits"}


def test_a_cap_is_kept_or_not(begun):
    step = Case("step", case.FLOOR)
    peak = found(begun, step)["peak_allocated"]
    for cap, status in ((2.0 * peak, "measured"), (0.5 * peak, "out of memory")):
        assert found(begun, replace(step, measure="cap", cap=cap / GB)) == {"status": status}


@pytest.mark.parametrize("measure", ["step", "launches"])
def test_memory_that_does_not_suffice_is_a_result(begun, monkeypatch, measure):
    def iteration(*_):
        def run():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        return run

    monkeypatch.setattr(answering, "iteration", iteration)
    assert found(begun, Case(measure, "original")) == {"status": "out of memory"}


def test_memory_that_does_not_suffice_under_a_cap_is_a_result(begun, monkeypatch):
    def fits(self, run, held, cap):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CpuMeter, "fits", fits)
    assert found(begun, Case("cap", "dot", cap=24.0)) == {"status": "out of memory"}


def test_a_card_smaller_than_the_cap_is_no_result(begun, monkeypatch):
    def fits(self, run, held, cap):
        raise ValueError("the card has 25.4 GB")

    monkeypatch.setattr(CpuMeter, "fits", fits)
    row = found(begun, Case("cap", "dot", cap=80.0))
    assert row == {"status": "not measured", "reason": "the card has 25.4 GB"}


def test_an_error_of_a_contender_is_a_row(begun, monkeypatch):
    def broken(*_):
        raise NotImplementedError("no kernel\nand more lines")

    monkeypatch.setattr(answering, "iteration", broken)
    row = found(begun, Case("step", "jvp"))
    assert row == {"status": "failed", "error": "NotImplementedError: no kernel"}


def test_a_hypergradient_that_is_not_finite_is_no_figure(begun, monkeypatch):
    monkeypatch.setattr(answering, "hypergradients", lambda *_: [1.0, float("nan")])
    row = found(begun, Case("agreement", "dot"))
    assert row == {"status": "failed", "error": "a hypergradient is not finite"}
