"""The benchmark: what it counts is right, peers compute what they should, rows hold together."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import pytest
import torch

from bilevel import CentralDifference, Identity, OneStep, Refusal, Unrolled, tree
from recipes.evidence.bench import copies, core, memory_cap, peers, report
from recipes.evidence.bench.case import make_case, plain_step, plain_upper_gradient, tree_bytes
from recipes.evidence.bench.contenders import (
    FLOOR,
    ROUTES,
    SINGLES,
    TORCHOPT,
    Contender,
    baselines,
    contenders,
    reference,
)
from recipes.evidence.bench.decoder import Sizes
from recipes.evidence.bench.evaluate import evaluate
from recipes.evidence.bench.measure import Timed, in_rounds, median_of, with_flops, with_peak
from tests.bilevel.run_window import run_step, run_window

TINY = Sizes(
    layers=1, width=16, heads=2, hidden=32, vocabulary=32, examples=4, tokens=12, instances=16
)
KEYS = {
    *("route", "model", "dtype", "forwards", "overhead_vs_floor"),
    *("peak_saved_bytes", "rel_error", "unroll_steps"),
}
GIB = 1 << 30


@pytest.fixture(scope="module")
def case():
    return make_case(TINY, 3)


@pytest.fixture(scope="module")
def double(case):
    return case.cast(torch.float64)


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


# What is counted.


@pytest.mark.parametrize(
    ("name", "beyond"),
    {
        "dot, upper-first": 0,
        "ghost, upper-first, average": 0,
        "reverse, lower-first": 0,
        "unrolled, 4 steps": 0,
        "implicit, 5 iterations of CG": 1,  # of the right-hand side, at length 1
        "penalty": 0,
    }.items(),
)
def test_a_functional_route_holds_no_copy_that_its_equation_does_not_need(
    name, beyond, monkeypatch
):
    monkeypatch.setattr(copies, "WIDTH", 288)  # still large leaves, which are not joined
    (one,) = (one for one in copies.COUNTED if one.name == name)
    found = copies.copies(one, resident=False) - one.needed - beyond
    assert 0.0 <= found < 0.4  # temporaries of a few leaves


def test_peak_is_what_was_alive_at_once():
    def run():
        first = torch.empty(1000)  # 4,000 bytes
        second = torch.empty(3000)  # together 16,000
        del second
        third = torch.empty(1500)  # together 10,000
        return first, third

    assert with_peak(run)[1] == 16_000
    kept, peak = with_peak(run)
    assert peak == 16_000
    assert tree_bytes(kept) == 10_000


def test_peak_counts_what_a_backward_pass_needs():
    x = torch.randn(10, 100)
    weights = [torch.randn(100, 100, requires_grad=True) for _ in range(8)]

    def forward():
        y = x
        for weight in weights:
            y = (y @ weight).exp()
        return y.sum()

    # exp saves its output, the product its input, which is the same tensor.
    assert with_peak(forward)[1] == pytest.approx(8 * 4000, abs=2 * 4000 + 8)
    with torch.no_grad():
        assert with_peak(forward)[1] <= 3 * 4000 + 8


def test_arithmetic_of_the_floor_is_three_forward_passes_each(case):
    (_, forward), (_, step) = (with_flops(run) for run in baselines(case).values())
    assert step == 3 * forward
    assert with_flops(lambda: plain_upper_gradient(case, case.lower))[1] == 3 * forward


def test_rounds_take_turns_and_are_due_when_they_say():
    calls: list[str] = []
    timed = {
        "a": Timed(lambda: calls.append("a")),
        "b": Timed(lambda: calls.append("b"), every=2),
    }
    found = in_rounds(timed, 4)
    assert [sorted(calls[:1]), sorted(calls[1:3]), calls[3:4], sorted(calls[4:6]), calls[6:]] == [
        ["a"],
        ["a", "b"],
        ["a"],
        ["a", "b"],
        ["a"],
    ]
    assert [set(one) for one in found] == [{"a", "b"}, {"a"}, {"a", "b"}, {"a"}]
    ratios = [{"a": 2.0, "b": 6.0}, {"a": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 5.0}]
    assert median_of(ratios, lambda one: one["b"] / one["a"]) == 3.0
    with pytest.raises(ValueError, match="no round"):
        median_of(ratios, lambda one: one["c"])


# The case.


def test_the_case_is_the_same_at_every_call_and_not_cold(case):
    again = make_case(TINY, 3)
    for one, other in ((case.lower, again.lower), (case.state, again.state)):
        for x, y in zip(tree.leaves(one), tree.leaves(other), strict=True):
            assert torch.equal(x, y)
    assert int(case.state.steps) == 64
    assert all((leaf > 0.0).all() for leaf in case.state.second_moment.values())
    assert len(case.batches) == 3
    assert len({int(i) for batch in case.batches for i in batch["instance"]}) == 12
    with pytest.raises(ValueError, match="needs 20 instances, found 16"):
        make_case(TINY, 5)


def test_casting_up_changes_no_number(case):
    half = case.cast(torch.bfloat16)
    assert half.optimizer.state_dtype is torch.float32
    back = half.cast(torch.float64)
    assert back.optimizer.state_dtype is None
    for name, leaf in half.lower.items():
        assert torch.equal(leaf.double(), back.lower[name])
    assert torch.equal(case.cast(torch.float64).upper["raw"].float(), case.upper["raw"])


def test_losses_in_float64_are_computed_in_float64(double):
    """An op in float32 somewhere would show: the loss is smooth to 1e-9 only in float64."""
    direction = plain_upper_gradient(double, double.lower)

    def loss(step):
        return double.upper_loss(tree.axpy(step, direction, double.lower), {}, double.upper_batch)

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert float(slope) == pytest.approx(float(tree.vdot(direction, direction)), rel=1e-8)


# The peers.


@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled_is_torchopts_double_backward(double, steps):
    wanted = peers.torchopt_unroll(double, steps)
    assert relative(reference("unrolled", double, steps), wanted) <= 1e-11
    found = run_window(
        Unrolled(),
        double.problem,
        double.optimizer,
        double.lower,
        double.upper,
        double.state,
        [[batch] for batch in double.batches[:steps]],
        double.upper_batch,
    )
    assert relative(found.hypergradient["raw"], wanted) <= 1e-11


def test_darts_in_place_converges_to_its_limit_at_second_order(double):
    limit = reference("darts", double, 1)
    errors = [relative(peers.darts_in_place(double, r)[0], limit) for r in (0.02, 0.01, 0.005)]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.02)


def test_darts_leaves_the_case_alone_but_not_its_parameters(case):
    half = case.cast(torch.bfloat16)
    before = tree.map(torch.clone, half.lower)
    _, changed = peers.darts_in_place(half)
    assert 0.0 < changed < 1.0
    assert all(torch.equal(half.lower[name], leaf) for name, leaf in before.items())


def test_identity_at_the_new_parameters_is_darts_limit(double):
    """Betty differentiates at θ', `OneStep` at θ: with no step between them they are one."""
    still = double.cast(torch.float64)
    object.__setattr__(still, "optimizer", type(still.optimizer)(0.0))
    method = OneStep(CentralDifference(radius=1e-4), update_derivative=Identity())
    found = run_step(
        method,
        still.problem,
        still.optimizer,
        still.lower,
        still.upper,
        still.state,
        still.batches[:1],
        still.upper_batch,
    )
    assert relative(found.hypergradient["raw"], peers.darts_limit(still)) <= 1e-6


def test_torchs_adamw_takes_the_same_step(double):
    taken = {}

    class Seen(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            taken["params"] = [p.detach().clone() for p in self.param_groups[0]["params"]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Seen)
        peers.torch_floor(double)()
    wanted, _ = plain_step(double, double.lower, double.state, double.batches[:1])
    for found, name in zip(taken["params"], wanted, strict=True):
        torch.testing.assert_close(found, wanted[name], rtol=1e-9, atol=1e-12)


def test_without_betty_there_is_no_row(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "betty", None)
    monkeypatch.setitem(sys.modules, "betty.problems", None)
    assert peers.betty_engine(case) is None
    assert not any("Betty 0.2.1" in one.route for one in contenders(case, [], GIB))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, at import
@pytest.mark.skipif(
    importlib.util.find_spec("betty") is None,
    reason="betty-ml is not installed (it never is in CI)",
)
def test_betty_itself_does_what_is_written_by_hand(case):
    iteration = peers.betty_engine(case)
    assert iteration is not None
    assert relative(iteration(), peers.darts_in_place(case)[0]) <= 1e-2


def test_torchopts_process_reports_and_is_ended_when_it_grows(case):
    found = memory_cap.measure_torchopt(TINY, 3, 2, 8 * GIB)
    assert found is not None
    here = peers.torchopt_unroll(case, 2)
    torch.testing.assert_close(torch.tensor(found["hypergradient"]), here, rtol=1e-4, atol=1e-7)
    assert found["peak"] > case.state_bytes
    assert found["flops"] > 0
    assert memory_cap.measure_torchopt(TINY, 3, 2, 1 << 20) is None
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        memory_cap.capped([sys.executable, "-c", "1 / 0"], 8 * GIB)


def test_memory_that_nobody_saw_in_time_counts(monkeypatch):
    """The process ended before it was looked at; it says itself what it held."""
    said = {"hypergradient": [0.0], "flops": 1, "peak": 1, "resident": GIB}
    monkeypatch.setattr(memory_cap, "capped", lambda command, cap: json.dumps(said))
    assert memory_cap.measure_torchopt(TINY, 1, 1, GIB - 1) is None
    found = memory_cap.measure_torchopt(TINY, 1, 1, GIB)
    assert found == {"hypergradient": [0.0], "flops": 1, "peak": 1}


# Rows.


def test_a_refusal_is_a_row_that_says_so(case):
    def refuse():
        raise Refusal("no rule for this\nand more")

    one = evaluate(Contender("ghost", case, refuse))
    assert one.notes == ["refused: no rule for this"]
    full = evaluate(Contender("peer", case, refuse, process=lambda: None))
    assert full.notes == ["out of memory"]
    assert full.peak is None
    row = core._row(full, None, None)
    assert row["route"] == "peer (out of memory)"
    assert set(row) == KEYS


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            memory_cap,
            "measure_torchopt",
            lambda sizes, window, steps, cap: (
                None
                if steps == 2
                else {"hypergradient": [0.0] * TINY.instances, "peak": 1, "flops": 1}
            ),
        )
        return core.measure(core.Plan(TINY, [1, 2], rounds=2, cap=GIB, reference_steps=1))


def test_rows_have_the_agreed_keys(measured):
    rows, details = measured["rows"], measured["details"]
    assert all(set(row) == KEYS for row in rows)
    assert [d["route"] for d in details] == [r["route"].split(" (out")[0] for r in rows]
    json.dumps(measured, allow_nan=False)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert {row["unroll_steps"] for row in rows} == {1, 2}
    names = [(d["route"], d["dtype"]) for d in details]
    for route in (*ROUTES, FLOOR, SINGLES):
        assert {(route, "float32"), (route, "bfloat16")} <= set(names)


def test_rows_hold_together(measured):
    for row, detail in zip(measured["rows"], measured["details"], strict=True):
        if detail["route"] in (FLOOR, SINGLES):
            assert row["overhead_vs_floor"] == 1.0
        if detail["route"] == FLOOR:  # of the plain gradient
            assert 0.0 < row["rel_error"] <= {"float32": 1e-4, "bfloat16": 0.1}[row["dtype"]]
        if row["route"].endswith("(out of memory)"):
            assert row["forwards"] is row["peak_saved_bytes"] is row["rel_error"] is None
            assert row["unroll_steps"] == 2
            continue
        assert row["forwards"] > 0.0
        assert row["peak_saved_bytes"] > 0
        exact = detail["route"] in ROUTES and "central" not in detail["route"]
        if exact:
            assert row["rel_error"] <= {"float32": 1e-4, "bfloat16": 0.1}[row["dtype"]]
        if detail["route"].startswith("unrolled") and row["unroll_steps"] == 2:
            assert row["rel_error"] is None
            assert "not computed in float64" in detail["notes"]
        elif detail["route"].startswith("unrolled"):
            assert row["rel_error"] <= 1e-4
            assert detail["cosine_to_exact"] >= 1.0 - 1e-6


def test_arithmetic_per_route(measured):
    """In forward passes: 6 for the floor and whatever products come for free, 3 more for jvp."""
    found = {
        d["route"]: d["forwards_by_flops"]
        for d in measured["details"]
        if d["dtype"] == "float32" and d["unroll_steps"] == 1 and d["batch"] == "4 x 12"
    }
    assert found[FLOOR] == found["dot, lower-first"] == found["dot, upper-first"] == 6.0
    assert found["central difference, lower-first"] == 8.0
    assert 8.5 <= found["jvp, lower-first"] <= 9.5
    assert found["jvp, lower-first"] < found["reverse, lower-first"]
    for route in ("ghost, upper-first", "per-example, lower-first"):
        assert 6.0 <= found[route] <= 7.0


def test_the_table_has_every_row_and_every_target(measured):
    lines = report.table(measured).splitlines()
    for detail in measured["details"]:
        assert any(line.startswith(detail["route"]) for line in lines)
    assert sum(": " in line and ", found" in line for line in lines) == len(measured["targets"])


def test_targets_take_the_worst_and_say_what_is_missing():
    rows = [
        {"dtype": "float32", "unroll_steps": 1, "overhead_vs_floor": 1.02, "rel_error": 1e-7},
        {"dtype": "float32", "unroll_steps": 1, "overhead_vs_floor": 1.07, "rel_error": 3e-6},
        {"dtype": "float32", "unroll_steps": 4, "peak_saved_bytes": 1000},
        {"dtype": "float32", "unroll_steps": 16, "peak_saved_bytes": 4600},
        {"dtype": "float32", "unroll_steps": 16, "peak_saved_bytes": None},
    ]
    routes = ["dot, lower-first", "dot, upper-first", "unrolled", "unrolled", TORCHOPT]
    details = [{"route": route, "over_torchopt": None, "batch": "4 x 256"} for route in routes]
    details[3] |= {"over_torchopt": 1.25, "forwards_by_flops": 48.0}
    details[4]["forwards_by_flops"] = 40.0
    for route, flops in ((FLOOR, 6.0), ("jvp, lower-first", 9.1)):
        details.append(details[0] | {"route": route, "forwards_by_flops": flops})
        details[-1]["extra_forwards"] = 3.8 if flops > 6.0 else 0.0
        rows.append({"dtype": "float32", "unroll_steps": 1})
    found = {one["target"]: one for one in report.targets(rows, details, state_bytes=200)}
    for route, figure in (("dot, lower-first", 1.02), ("dot, upper-first", 1.07)):
        dot = found[f"{route}, 4 x 256: at most 1.05 x floor"]
        assert (dot["found"], dot["met"]) == (figure, figure < 1.05)
    jvp = found["jvp, 4 x 256: at most 3.6 forward passes beyond the floor"]
    assert (jvp["found"], jvp["met"], jvp["counted"]) == (3.8, False, 3.1)
    errors = found["errors of exact routes in float32: at most 1e-05"]
    assert (errors["found"], errors["met"]) == (3e-6, True)
    ghost = found["ghost, 4 x 256: at most 1.2 x floor"]
    assert (ghost["found"], ghost["met"]) == (None, None)
    (growth,) = (one for name, one in found.items() if name.startswith("unrolled: peak"))
    assert growth["found"] == pytest.approx(3600 / 12 / 200)
    assert growth["met"] is False
    faster = found["unrolled(16): at most 1.3 x the time of TorchOpt's double backward"]
    assert (faster["found"], faster["met"], faster["counted"]) == (1.25, True, 1.2)
    slower = found["unrolled(4): at most 1.3 x the time of TorchOpt's double backward"]
    assert math.isnan(slower["found"] or math.nan)


def test_the_command_parses_and_names_its_benchmarks(monkeypatch):
    from recipes.evidence.bench import __main__ as entry

    monkeypatch.setattr(sys, "argv", ["bench", "nonsense"])
    said = "expected core, embedded, race or copies, found 'nonsense'"
    with pytest.raises(SystemExit, match=said):
        entry.main()
    for arguments in (["--help"], ["core", "--help"], ["embedded", "--help"]):
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        with pytest.raises(SystemExit) as done:
            entry.main()
        assert done.value.code == 0
