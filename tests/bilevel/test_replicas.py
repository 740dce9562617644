"""Several ranks are one process: the same θ, φ and figures, up to the order of sums."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bilevel import BilevelSolver, OneStep, Penalty, Replicas, check_hypergradient
from tests.bilevel import rank_cases
from tests.rank_processes import fork_ranks, run_ranks

CASES = rank_cases.cases()
RUNS = [(ranks, name) for ranks in (2, 3) for name in rank_cases.cases_of(ranks)]
FORWARD_MODE = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of 2, and each of 3, found."""
    folder, result = tmp_path_factory.mktemp("ranks"), {}
    fork_ranks("tests.bilevel.rank_cases", folder, 2, 3)
    for ranks in (2, 3):
        result[ranks] = [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]
    return result


@FORWARD_MODE
@pytest.mark.filterwarnings("ignore::bilevel.StationarityWarning")
@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_ranks_are_one_process(found, name, ranks):
    """Also where parts differ in size or are empty, and where the clip is active."""
    one = rank_cases.alone(CASES[name], ranks)
    first = found[ranks][0][name]
    assert first.keys() == one.keys()
    assert int(one["upper_steps"]) == 2
    for key, expected in one.items():
        difference = (first[key].double() - expected.double()).norm()
        assert difference <= CASES[name].tolerance * max(1.0, expected.double().norm()), key


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_ranks_stay_the_same_bit_for_bit(found, name, ranks):
    first, *others = (rank[name] for rank in found[ranks])
    for other in others:
        assert other.keys() == first.keys()
        for key, value in first.items():
            assert torch.equal(value, other[key]), key


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """What each of two ranks met, by the fault; the second was then killed."""
    folder = tmp_path_factory.mktemp("faults")
    (status, output), (killed, _) = run_ranks("tests.bilevel.rank_faults", 2, folder)
    assert (status, killed) == (0, -9), output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_an_error_of_one_rank_ends_all_with_its_sentence(faults):
    assert faults[1]["refusal"].startswith("ValueError: route Dot(): expected micro-batches of 1")
    assert faults[0]["refusal"].startswith(
        "RankError: rank 1: ValueError: route Dot(): expected micro-batches of 1"
    )


def test_ranks_go_on_after_an_error_that_all_know_of(faults):
    assert faults[0]["after"] == faults[1]["after"] == "step 1"


def test_ranks_at_different_places_are_an_error_and_no_hang(faults):
    expected = "rank 0 at the upper gradient, rank 1 at the figures"
    assert all(expected in rank["places"] for rank in faults)


def test_a_rank_that_is_killed_ends_the_others_with_a_sentence(faults):
    assert "another rank is gone or does not answer" in faults[0]["killed"]
    assert faults[0]["seconds"] < 30


def test_a_sparse_sum_is_the_dense_one_in_fewer_bytes(faults):
    for rank in faults:
        assert rank["sparse sum"] == rank["dense sum"]
        assert rank["dense entries"] >= rank_cases.ROWS
        assert rank["sparse entries"] <= 40  # two of 5,000 entries on each rank, and headers
        assert rank["full entries"] >= rank_cases.ROWS  # too many entries: sent densely
        assert rank["nan"] == [0.0, "nan"]


def test_a_bilevel_step_sends_the_gradient_of_theta_twice(faults):
    """Lower and upper gradient, padded, and headers and figures.

    The upper loss of the tests depends on every entry of the table directly, which is sent, too;
    its gradient through the weights would be as many entries more.
    """
    for rank in faults:
        rest = rank["entries"] - rank_cases.ROWS
        assert 2 * rank["parameters"] <= rest <= 2 * (rank["parameters"] + 64 * 7) + 160


def test_parameters_of_other_names_are_refused(faults):
    assert all("different structure or names" in rank["names"] for rank in faults)


def test_what_is_not_proven_over_ranks_is_refused_by_name():
    problem, _, _ = rank_cases.problem_of(CASES["jvp, table"])
    two = SimpleNamespace(ranks=2)
    with pytest.raises(ValueError, match=r"Penalty does not sum over ranks .* choose OneStep\(\)"):
        BilevelSolver(problem, rank_cases.PLAIN, rank_cases.PLAIN, Penalty(1.0), collective=two)
    solver = BilevelSolver(problem, rank_cases.PLAIN, rank_cases.PLAIN, OneStep(), collective=two)
    with pytest.raises(ValueError, match="meta_batch: expected one process, found 2 ranks"):
        solver.meta_batch(None, [])


def test_an_audit_over_ranks_is_refused():
    problem, theta, phi = rank_cases.problem_of(CASES["jvp, table"])
    two = SimpleNamespace(ranks=2)
    solver = BilevelSolver(problem, rank_cases.PLAIN, rank_cases.PLAIN, OneStep(), collective=two)
    state = BilevelSolver(problem, rank_cases.PLAIN, rank_cases.PLAIN).init(theta, phi)
    with pytest.raises(ValueError, match="check_hypergradient: expected one process, found 2"):
        check_hypergradient(solver, state, [], None)


def test_replicas_without_processes_say_how_to_get_them():
    with pytest.raises(RuntimeError, match=r"torch\.distributed has no processes"):
        Replicas()
