"""Every weighting, route and command on a pretend accelerator: no mix-up, no unlisted wait.

In a step that is not logged there is no wait but those that are ``LISTED``. On a CUDA device each
holds up the host until the device has done all that it was given.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerated import (
    FAULTS,
    FORWARD_MODE,
    LAUNCHES,
    LAUNCHING,
    MANY,
    ON_CPU,
    RACE,
    TRAININGS,
    USES,
)
from tests.faked import SOLVERS

ROOT = Path(__file__).parents[2]
SCENARIOS = (*TRAININGS, *USES, RACE, LAUNCHES)

LISTED = {
    "bilevel/optimizers/lazy.py:_update_rows": {"lazy"},
    "bilevel/hypergradients/penalty.py:_compare": {"penalty"},
    "bilevel/autodiff/finite_difference.py:_step": {"central-difference"},
    "bilevel/autodiff/finite_difference.py:central_difference": {"central-difference"},
    "bilevel/autodiff/stop_gradients.py:<genexpr>": {"central-difference"},
    "bilevel/autodiff/stop_gradients.py:_same": {"central-difference"},
    # Steps that are looked at one by one: recipes.run.late.are_possible says which.
    "bilevel/lower/guard.py:lower": {"penalty", "unrolled", "resident average"},
    "bilevel/lower/guard.py:weights": {"resident average"},
    "bilevel/lower/guard.py:holds": {"resident average"},
    "bilevel/resident/plain.py:single_step": {"resident dot"},
    "bilevel/resident/plain.py:single_pass": {"resident dot"},
    "bilevel/resident/upper_first.py:<genexpr>": {"resident average"},
    "bilevel/solver.py:_upper_step": {"penalty", "unrolled", "resident dot", "resident average"},
    "bilevel/tree.py:on_host": {"penalty", "unrolled", "resident dot", "resident average"},
}
"""Places that wait in a step that is not logged, and the scenarios in which they do.

A lazy optimizer waits for the number of rows that were visited, the penalty for the distance of its
copy, a central difference for the length of its step and for the constants that it holds.
"""

MOST = {"central-difference": 6, "resident average": 10, "unrolled": 4, "penalty": 4}
"""How often a scenario waits in such a step, if not as often as it has places."""


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    """What was noted in each scenario, all run in one process of their own."""
    folder = tmp_path_factory.mktemp("accelerated")
    out, names = folder / "noted.json", (*SCENARIOS, ON_CPU, FAULTS, FORWARD_MODE)
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
    waits = noted[name]["waits"]
    places = {place for place, names in LISTED.items() if name in names}
    assert waits.keys() == places
    assert sum(waits.values()) <= MOST.get(name, len(places))


def test_what_is_listed_is_of_scenarios():
    assert set().union(*LISTED.values(), MOST) <= TRAININGS.keys()


def test_the_run_is_that_of_the_cpu(noted):
    """Sums are taken in another order on a device, so the last bits differ."""
    expected, found = noted[ON_CPU], noted["table"]
    assert len(found["losses"]) == 4
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert expected["kinds"] == []


def test_a_race_in_place_is_that_of_the_cpu(noted):
    """The hypergradients of the original, and of ``Dot`` and ``Ghost`` in place."""
    found = noted[RACE]["losses"]
    assert len(found) == 6
    assert found[::2] == pytest.approx(found[1::2], rel=1e-4)


def test_an_iteration_starts_few_kernels_beside_those_of_the_model(noted):
    """On a model with the tensors of InternVL3-1B; by the rules of ``tests/launches.py``."""
    of_one, of_several, *beside = noted[LAUNCHES]["losses"]
    found = dict(zip(LAUNCHING, beside, strict=True))
    assert 5000 < of_one <= of_several
    assert found["dot"] <= 200
    assert found["dot, upper-first"] <= 200
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    for examples, count in ((1, of_one), (LAUNCHING["ghost"], of_several)):
        assert f"| both passes, of the model itself | {examples} | {count:,} |" in page
    for name, count in found.items():
        assert f"| {name} | {LAUNCHING[name]} | {count:,} |" in page


def test_faults_are_seen(noted):
    found = noted[FAULTS]
    assert found["error"] is None
    assert found["kinds"] == [
        *("transfer", "mix-up", "wait", "transfer", "wait", "transfer", "wait", "wait")
    ]
    (mixed,) = found["mix-ups"]
    assert mixed.startswith("add at ")
    norm = math.sqrt(sum((leaf + entry) ** 2 for leaf in range(MANY) for entry in range(3)))
    expected = [9.0, norm, 1.0, 2.0, *(0.0, 0.0, 0.0, 1.0), *(0.0, 1.0, 0.0)]
    assert found["losses"] == pytest.approx(expected)


LOOKED_AT = {"bilevel/lower/guard.py:lower", "bilevel/solver.py:_upper_step"}


@pytest.mark.parametrize("name", SOLVERS)
def test_forward_mode_mixes_no_devices_up(noted, name):
    found = noted[FORWARD_MODE][name]
    assert found["error"] is None, found["error"]
    assert found["waits"].keys() >= LOOKED_AT
    mixed = noted[FORWARD_MODE][f"{name} mixed up"]["error"]
    assert "FakeTensorDeviceMismatchError" in mixed


def test_forward_mode_waits_for_nothing_but_the_solution_of_a_system(noted):
    for name in SOLVERS:
        found = noted[FORWARD_MODE][f"{name} late"]
        assert found["error"] is None, found["error"]
        places = {place for place in found["waits"] if "implicit" in place or "linear" in place}
        assert found["waits"].keys() == places
        assert bool(places) is (name == "implicit")
