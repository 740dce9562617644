"""The plan past one machine, by figures that can be checked by hand."""

from __future__ import annotations

import pytest

from recipes.evidence.growth.plan import (
    INTERNVL3_8B,
    Cluster,
    Method,
    Model,
    passes,
    planned,
)

# F = 2·100·10 + 2·10²·3·5 + 1000 = 2000 + 3000 + 1000
SMALL = Model(parameters=120, active=100, tokens=10, layers=3, width=5, tower_flops=1000)
LINKS = {"flops": 1e6, "utilisation": 0.5, "inside": 1e4, "outside": 1e3}


def test_a_forward_pass():
    assert SMALL.forward_flops == 6000
    # 2·6.53e9·1980 = 25.86e12, 2·1980²·3584·28 = 0.787e12, 3.62e12
    assert INTERNVL3_8B.forward_flops == pytest.approx(30.27e12, rel=1e-3)


def test_passes_of_a_step():
    assert passes(Method(upper=False)) == 1
    assert passes(Method()) == 2
    assert passes(Method(every=5)) == pytest.approx(1.2)


def test_shards_of_one_machine():
    found = planned(SMALL, Cluster(1, 4, **LINKS), Method(), examples=2)
    assert found["state_bytes"] == 5 * 4 * 120 / 4 == 600
    assert found["flops"] == 3 * 6000 * 2 * 2 == 72_000
    # Two passes of 2 gathered bytes twice and 4 summed ones, three quarters of them from others.
    assert found["inside_bytes"] == 2 * 8 * 120 * 3 / 4 == 1440
    assert found["outside_bytes"] == 0
    assert found["computing_seconds"] == pytest.approx(0.144)
    assert found["sending_seconds"] == pytest.approx(0.144)
    assert found["efficiency"] == pytest.approx(1.0)
    assert found["examples_per_second"] == pytest.approx(8 / 0.144)


def test_shards_of_several_machines_send_all_of_it_outside():
    found = planned(SMALL, Cluster(2, 4, **LINKS), Method(), examples=2)
    assert found["state_bytes"] == 300
    assert (found["inside_bytes"], found["outside_bytes"]) == (0, 2 * 8 * 120 * 7 / 8)
    assert found["sending_seconds"] == pytest.approx(1.68)
    assert found["efficiency"] == pytest.approx(0.144 / 1.68)


def test_replicas_of_a_machine_send_their_shards_of_the_gradients_outside():
    found = planned(SMALL, Cluster(2, 4, **LINKS), Method(across="replicas"), examples=2)
    assert found["state_bytes"] == 600
    assert found["inside_bytes"] == 1440
    # A ring of 2 sends the shard of 30 floats once, for each of the two gradients.
    assert found["outside_bytes"] == 2 * 1 * 4 * 120 / 4 == 240
    assert found["sending_seconds"] == pytest.approx(0.24)


def test_an_upper_gradient_for_several_steps():
    fresh, held = (
        planned(SMALL, Cluster(1, 4, **LINKS), Method(every=every), examples=2) for every in (1, 5)
    )
    plain = planned(SMALL, Cluster(1, 4, **LINKS), Method(copies=4, upper=False), examples=2)
    assert fresh["flops"] == 2 * plain["flops"]
    assert held["flops"] == pytest.approx(1.2 * plain["flops"])
    assert held["inside_bytes"] == pytest.approx(1.2 * plain["inside_bytes"])
    assert plain["state_bytes"] == 480
