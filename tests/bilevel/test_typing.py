"""What a type checker makes of a user's problem: parameters and batches that belong together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

mypy = pytest.importorskip("mypy.api", reason="mypy, which reads the types, is not installed")

PROBLEM = """
from torch import Tensor

from bilevel import SGD, BilevelProblem, BilevelSolver, ReweightingProblem


def lower_loss(lower: dict[str, Tensor], upper: Tensor, batch: list[Tensor]) -> Tensor:
    return ((batch[0] @ lower["w"]).square() + upper).mean()


def losses(lower: dict[str, Tensor], batch: list[Tensor]) -> tuple[Tensor, None]:
    return (batch[0] @ lower["w"]).square(), None


def weights(upper: Tensor, batch: list[Tensor], features: None) -> Tensor:
    return upper.expand(len(batch[0]))


def run(w: Tensor, phi: Tensor, x: Tensor) -> Tensor:
    solver = BilevelSolver(BilevelProblem(lower_loss, lower_loss), SGD(0.1), SGD(0.1))
    state = solver.init({"w": w}, phi)
    state, info = solver.step(state, [[x]], [x])
    return state.lower_params["w"] + state.upper_params


def weighted(w: Tensor, phi: Tensor, x: Tensor) -> Tensor:
    problem = ReweightingProblem(losses, weights, lower_loss)
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1))
    state, _ = solver.window(solver.init({"w": w}, phi), [[[x]]], [x])
    return state.lower_params["w"]


def wrong(w: Tensor, phi: Tensor, x: Tensor) -> None:
    solver = BilevelSolver(BilevelProblem(lower_loss, lower_loss), SGD(0.1), SGD(0.1))
    state = solver.init({"w": w}, phi)
    solver.init([w], phi)  # parameters: error
    solver.step(state, [x])  # lower batch: error
    solver.step(state, [[x]], {"x": x})  # upper batch: error
    state.upper_params["phi"].keys()  # φ is a tensor: error
    solver.init({"w": 1.0}, phi)  # not a tensor: error
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Lines of the file and numbers of the lines where mypy finds an error."""
    path = tmp_path_factory.mktemp("typing") / "problem.py"
    path.write_text(PROBLEM, encoding="utf-8")
    root = Path(__file__).parents[2]
    # The settings of ``make lint``, whose cache then holds what torch and the packages mean.
    settings = (f"--config-file={root / 'setup.cfg'}", "--no-error-summary")
    text, problems, _ = mypy.run([*settings, f"--cache-dir={root / '.mypy_cache'}", str(path)])
    assert not problems, problems
    errors = re.findall(r"problem\.py:(\d+): error: ", text)
    return PROBLEM.splitlines(), {int(number) for number in errors}


def test_what_belongs_together_passes(report):
    lines, found = report
    assert [lines[number - 1] for number in found if "error" not in lines[number - 1]] == []


def test_what_does_not_is_an_error(report):
    lines, found = report
    expected = {number for number, line in enumerate(lines, 1) if line.endswith(": error")}
    assert len(expected) == 5
    assert expected <= found
