"""Cases within limits: what is too slow is cut, and what was measured before is written."""

from __future__ import annotations

import sys

import pytest

from recipes.evidence.gpu.case import Case
from recipes.evidence.gpu.measuring import Limits, NotReady, measure

# Answers a case by its contender and its own number; "jvp" never, and "ghost" by its end.
WORKER = """
import json, os, sys
print(json.dumps({"process": os.getpid()}), flush=True)
for line in sys.stdin:
    contender = json.loads(line)["contender"]
    if contender == "jvp":
        sys.stdin.read()
    if contender == "ghost":
        sys.exit("CUDA error: an illegal memory access was encountered")
    print(json.dumps({"status": "measured", "seconds": len(contender)}), flush=True)
"""
LIMITS = Limits(budget=120.0, row=60.0, start=60.0)


def run(contenders, limits, script=WORKER):
    """Rows, and what was written after each."""
    written = []
    wanted = [Case("step", contender) for contender in contenders]
    found = measure(
        wanted,
        [sys.executable, "-c", script],
        limits,
        lambda about, rows: written.append((about["process"], list(map(dict, rows)))),
    )
    return found, written


def test_rows_are_written_as_they_come():
    rows, written = run(["dot", "floor"], LIMITS)
    assert [row["contender"] for row in rows] == ["dot", "floor"]
    assert [row["seconds"] for row in rows] == [3, 5]
    assert rows[0]["tiles"] == 1
    assert [len(one) for _, one in written] == [1, 2, 2]
    assert len({process for process, _ in written}) == 1


def test_a_case_that_takes_too_long_is_cut_and_the_next_are_measured():
    rows, written = run(["dot", "jvp", "floor"], Limits(120.0, 4.0, 60.0))
    assert [row["status"] for row in rows] == ["measured", "cut", "measured"]
    assert rows[1]["limit"] == 4.0
    assert "seconds" not in rows[1]
    assert written[1][1][1]["status"] == "cut"
    assert written[0][0] != written[2][0]  # by another process


def test_a_process_that_ends_is_a_row_that_failed():
    rows, _ = run(["ghost", "dot"], LIMITS)
    assert [row["status"] for row in rows] == ["failed", "measured"]
    assert "status 1: CUDA error: an illegal memory access was encountered" in rows[0]["error"]


def test_what_the_budget_leaves_no_time_for_is_not_measured():
    rows, written = run(["jvp", "dot", "floor"], Limits(3.0, 60.0, 60.0))
    assert [row["status"] for row in rows] == ["cut", "not measured", "not measured"]
    assert rows[0]["limit"] <= 3.0
    assert rows[1]["reason"] == "the budget of 3 s was spent"
    assert written[-1][1] == rows


def test_a_process_that_is_never_ready_is_an_error():
    with pytest.raises(NotReady, match="not ready after 1 s"):
        run(["dot"], Limits(120.0, 60.0, 1.0), "import sys; sys.stdin.read()")
    script = "import sys; print('no model', file=sys.stderr); sys.exit(3)"
    with pytest.raises(NotReady, match="ended before it was ready: status 3: no model"):
        run(["dot"], LIMITS, script)
    with pytest.raises(NotReady, match="no time for a case"):
        run(["dot"], Limits(1.0, 60.0, 60.0))
