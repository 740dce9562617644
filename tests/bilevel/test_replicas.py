"""Several ranks are one process: the same θ, φ and figures, up to the order of sums."""

from __future__ import annotations

import pytest
import torch

from bilevel import Penalty
from tests.bilevel import rank_cases
from tests.rank_processes import run_ranks

CASES = rank_cases.cases()
FORWARD_MODE = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of 2, and each of 3, found."""
    folder, result = tmp_path_factory.mktemp("ranks"), {}
    for ranks in (2, 3):
        for status, output in run_ranks("tests.bilevel.rank_cases", ranks, folder):
            assert status == 0, output
        result[ranks] = [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]
    return result


@FORWARD_MODE
@pytest.mark.filterwarnings("ignore::bilevel.StationarityWarning")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_ranks_are_one_process(found, name, ranks):
    """Also where parts differ in size or are empty, and where the clip is active."""
    one = rank_cases.alone(CASES[name], ranks)
    first = found[ranks][0][name]
    assert first.keys() == one.keys()
    assert int(one["upper_steps"]) == 2
    for key, expected in one.items():
        difference = (first[key].double() - expected.double()).norm()
        assert difference <= CASES[name].tolerance * max(1.0, expected.double().norm()), key


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_ranks_stay_the_same_bit_for_bit(found, name, ranks):
    first, *others = (rank[name] for rank in found[ranks])
    for other in others:
        assert other.keys() == first.keys()
        for key, value in first.items():
            assert torch.equal(value, other[key]), key
