"""Ranks that hold shards of θ are one process: the same θ, φ and figures, up to the order of sums.

The one process takes the functional execution, which shares no pass and no step with the resident
one over shards.
"""

from __future__ import annotations

import pytest
import torch

from tests.bilevel import shard_cases
from tests.rank_processes import run_ranks

CASES = shard_cases.cases()
RUNS = [(ranks, name) for ranks in (2, 3) for name in CASES]
PARAMETERS = sum(
    leaf.numel()
    for leaf in shard_cases.model_of(shard_cases.Case()).parameters()
    if leaf.requires_grad
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of 2, and each of 3, found."""
    folder, result = tmp_path_factory.mktemp("shards"), {}
    for ranks in (2, 3):
        for status, output in run_ranks("tests.bilevel.shard_cases", ranks, folder):
            assert status == 0, output
        result[ranks] = [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]
    return result


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_shards_are_one_process(found, name, ranks):
    one = shard_cases.alone(CASES[name], ranks)
    first = found[ranks][0][name]["run"]
    assert first.keys() == one.keys()
    assert int(one["upper_steps"]) >= 2
    for key, expected in one.items():
        difference = (first[key].double() - expected.double()).nan_to_num().norm()
        assert torch.equal(first[key].isnan(), expected.isnan()), key
        scale = max(1.0, expected.double().nan_to_num().norm())
        assert difference <= 1e-12 * scale, (key, float(difference))


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_every_rank_holds_the_same_bits_of_the_whole(found, name, ranks):
    first, *others = (rank[name]["run"] for rank in found[ranks])
    for other in others:
        assert other.keys() == first.keys()
        for key, value in first.items():
            assert torch.equal(value.nan_to_num(7.0), other[key].nan_to_num(7.0)), key
