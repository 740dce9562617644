"""Every weighting, route and command on a pretend accelerator: no mix-up, no unlisted wait.

What remains of waits in a step that is not logged is ``LISTED``. On a CUDA device each holds up the
host until the device has done all that it was given.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerated import FAULTS, LAUNCHES, LAUNCHING, MANY, ON_CPU, RACE, TRAININGS, USES

ROOT = Path(__file__).parents[2]
SCENARIOS = (*TRAININGS, *USES, RACE, LAUNCHES)

PASSES = "prm/models/model.py:forward <- import_utils.torch_compilable_check"
"""InternVL compares the number of image tokens with that of tiles: once in every forward pass."""

SAYS = "prm/models/model.py:forward <- modeling_internvl.get_placeholder_mask"
"""It also writes that number into a message that it would show: once in every forward pass."""

MASKS = "prm/models/model.py:forward <- masking_utils._ignore_causal_mask_sdpa"
"""transformers asks whether anything is padded: at most twice in every forward pass."""

LISTED = {
    "bilevel/lower/steps.py:take_steps": "whether the lower gradient is finite; else no step",
    "bilevel/solver.py:_upper_step": "whether the hypergradient is finite; else no upper step",
    "bilevel/tree.py:on_host": "all that the loop judges and logs, together",
    "bilevel/lower/ghost/context.py:weight": "whether all weights are 1: autograd's own kernels",
    "bilevel/lower/ghost/origin.py:_picks": "whether an index leaves the rows where they are",
    "bilevel/lower/ghost/tracker.py:refusal": "whether the rows are the examples in order",
    "bilevel/hypergradients/penalty.py:_compare": "how far the copy is from the model",
    "bilevel/optimizers/lazy.py:_update_rows": "which rows of the table were visited",
    "prm/losses.py:pair_loss": "which pairs of candidates there are",
    "weighting/bounds.py:fraction_at_bound": "whether all rows of a table are at an end",
    "weighting/normalise.py:_divided": "whether the mean is far enough from 0",
}
"""Places that wait once in a step (of one micro-batch), and what for."""

TIMES = {"dot": 2, "reverse": 2, "rollback": 2, "penalty": 2, "unrolled": 4}
"""How often scenarios run the lower level in a step, or window, if not once."""

DIFFERENCES = {
    "bilevel/autodiff/finite_difference.py:_step": "how large the parameters are",
    "bilevel/autodiff/finite_difference.py:call": "values that leave torch, to be held constant",
    "bilevel/autodiff/finite_difference.py:central_difference": "how long the direction is",
    "bilevel/autodiff/stop_gradients.py:<genexpr>": "whether constants are those of θ",
    "bilevel/autodiff/stop_gradients.py:_same": "whether constants are those of θ",
}
"""Places that wait in a central difference, each a few times."""


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    """What was noted in each scenario, all run in one process of their own."""
    folder = tmp_path_factory.mktemp("accelerated")
    out, names = folder / "noted.json", (*SCENARIOS, ON_CPU, FAULTS)
    command = [sys.executable, "-m", "tests.accelerated", str(out), str(folder), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_mixed_up(noted, name):
    found = noted[name]
    assert found["error"] is None, found["error"]
    assert found["mix-ups"] == []
    assert "transfer" in found["kinds"]  # it was there at all


@pytest.mark.parametrize("name", [*TRAININGS, "cold-start"])
def test_the_host_waits_in_a_step_for_what_is_listed_alone(noted, name):
    waits = dict(noted[name]["waits"])
    passes = waits.pop(PASSES)
    assert waits.pop(SAYS) == passes
    assert waits.pop(MASKS) <= 2 * passes
    if name == "central-difference":
        assert all(waits.pop(place) <= 8 for place in DIFFERENCES)
    assert waits.keys() <= LISTED.keys()
    assert max(waits.values()) <= TIMES.get(name, 1)
    assert waits["bilevel/tree.py:on_host"] == 1


def test_nothing_is_listed_that_no_scenario_waits_for(noted):
    seen = set().union(*(found["waits"] for found in noted.values()))
    assert seen == {PASSES, SAYS, MASKS, *LISTED, *DIFFERENCES}


def test_the_run_is_that_of_the_cpu(noted):
    """Sums are taken in another order on a device, so the last bits differ."""
    expected, found = noted[ON_CPU], noted["table"]
    assert len(found["losses"]) == 2
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert expected["kinds"] == []


def test_a_race_in_place_is_that_of_the_cpu(noted):
    """The hypergradients of the original, and of ``Dot`` and ``Ghost`` in place."""
    found = noted[RACE]["losses"]
    assert len(found) == 6
    assert found[::2] == pytest.approx(found[1::2], rel=1e-4)


def test_an_iteration_starts_few_kernels_beside_those_of_the_model(noted):
    """On a model with the tensors of InternVL3-1B; by the rules of ``tests/launches.py``."""
    passes, *beside = noted[LAUNCHES]["losses"]
    found = dict(zip(LAUNCHING, beside, strict=True))
    assert passes > 5000
    assert found["dot"] <= 200
    assert found["dot, upper-first"] <= 200
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    assert f"| both passes, of the model itself | {passes:,} |" in page
    for name, count in found.items():
        assert f"| {name} | {count:,} |" in page


def test_faults_are_seen(noted):
    found = noted[FAULTS]
    assert found["error"] is None
    assert found["kinds"] == ["transfer", "mix-up", "wait", "transfer", "wait", "wait"]
    (mixed,) = found["mix-ups"]
    assert mixed.startswith("add at ")
    norm = math.sqrt(sum((leaf + entry) ** 2 for leaf in range(MANY) for entry in range(3)))
    assert found["losses"] == pytest.approx([9.0, norm, 1.0, 2.0, *(0.0, 0.0, 0.0, 1.0)])
