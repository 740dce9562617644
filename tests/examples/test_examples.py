"""The examples run, are short, and find what they say that they find."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bilevel import SGD

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NAMES = {
    *("noisy_labels", "maml", "implicit_hyperparameters", "data_distillation", "best_of_n"),
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_these_are_the_examples():
    assert {path.stem for path in SCRIPTS} == NAMES


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_short_and_says_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"\nRun: python examples/{path.name}" in text
    assert not re.search(r"^\s*(from|import) recipes", text, re.MULTILINE)
    inside = r"^\s*(?:from|import) (?:bilevel|prm|weighting)\."
    assert not re.search(inside, text, re.MULTILINE), "only names that the packages make public"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_readme_has_a_row(name):
    assert f"| `{name}.py` |" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_noisy_labels(capsys):
    found = load("noisy_labels").main()
    assert found["weight, wrong"] < found["weight, right"] / 3
    wrong_share = (found["weight, right"] - 1) / (found["weight, right"] - found["weight, wrong"])
    assert 0.45 < wrong_share < 0.55  # the weights' mean is 1, half of the labels are wrong
    assert found["learned weights"] > found["all weights 1"] + 0.03
    assert found["learned weights"] > found["clean rows alone"]
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_maml():
    found = load("maml").main()
    assert found["MAML"] < 0.5 * found["joint"] < 0.5 * found["random"]


def test_maml_is_the_derivative_through_steps_from_phi():
    """Twenty tasks in one pass give the gradients of tasks that are adapted one by one."""
    example = load("maml")
    torch.manual_seed(3)
    known, other = (tuple(part.double() for part in rows) for rows in example.draw(4))
    phi = {name: torch.randn(shape).double() / 4 for name, shape in example.SHAPES.items()}
    solver = replace(example.solver_for(4, 0.03), upper_optimizer=SGD(1.0))
    state, _ = solver.window(solver.init(None, phi), [[known]] * 3, other)

    leaves = {name: leaf.clone().requires_grad_() for name, leaf in phi.items()}
    total = torch.zeros((), dtype=torch.float64)
    for task in range(4):
        theta = leaves
        rows = [tuple(part[task : task + 1] for part in rows) for rows in (known, other)]
        for _ in range(3):
            loss = example.error(theta, leaves, rows[0])
            slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {
                name: leaf - 0.03 * slope
                for (name, leaf), slope in zip(theta.items(), slopes, strict=True)
            }
        total = total + example.error(theta, leaves, rows[1])
    expected = torch.autograd.grad(total, list(leaves.values()))
    for name, slope in zip(leaves, expected, strict=True):
        moved = phi[name] - state.upper_params[name]
        torch.testing.assert_close(moved, slope, rtol=1e-9, atol=1e-9)


def test_implicit_hyperparameters():
    """A `StationarityWarning` would be an error here."""
    found = load("implicit_hyperparameters").main()
    assert found["largest distance of a λ_j"] < 0.05  # of the 6 that some of them travel
    relevant, other = found["mean λ, features that matter"], found["mean λ, other features"]
    assert relevant < -4 < other - 1.5  # all started at −4
    single = found["test error, best single penalty"]
    assert 1 < found["test error, learned penalties"] < 1.6 < 2 < single  # 1: noise alone


def test_data_distillation():
    found = load("data_distillation").main()
    assert found["distilled"] > found["ten scans"] + 0.1
    assert found["distilled"] > found["class means"] + 0.02


def test_best_of_n():
    found = load("best_of_n").main()
    assert 0.4 < found["random"] < 0.6
    assert found["trained"] > found["majority"] + 0.02 > found["untrained"] + 0.2


def test_runs_as_a_script():
    """From any folder, as the README says; the others differ in nothing that matters here."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "implicit_hyperparameters.py")],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
    )
    assert "test error, learned penalties" in done.stdout
