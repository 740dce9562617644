"""What the README says can be run, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recipes.__main__ import make_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_core_snippet_runs_and_its_audit_agrees():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict = {}
    exec(compile(snippet, "README.md", "exec"), namespace)
    assert namespace["info"].weights.shape == (64,)
    from bilevel import check_hypergradient

    solver, state = namespace["solver"], namespace["state"]
    assert solver.hypergradient.order == "lower-first"
    double = [
        {name: value.double() for name, value in params.items()}
        for params in (state.lower_params, state.upper_params)
    ]
    to_double = lambda batch: {  # noqa: E731
        name: value.double() if value.is_floating_point() else value
        for name, value in batch.items()
    }
    fresh = solver.init(*double)
    for _ in range(3):
        fresh, _ = solver.step(fresh, [to_double(namespace["train"])])
    check = check_hypergradient(
        solver, fresh, [to_double(namespace["train"])], to_double(namespace["clean"])
    )
    assert check, check.message


def test_every_command_line_parses():
    parts = re.split(r"^```(\w*)\n", README, flags=re.MULTILINE)
    # parts: text, language of an opening fence, its content, "" of the closing fence, text, ...
    blocks = parts[2::4]
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("bilevel-prm ")]
    assert len(lines) >= 3
    for line in lines:
        make_parser().parse_args(line.split("#")[0].split()[1:])


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"train-net", "test", "help"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("name", re.findall(r"\b([a-z_]+\.py)\b", README))
def test_files_of_the_tree_exist(name):
    packages = ("bilevel", "weighting", "prm", "recipes")
    assert any((ROOT / package / name).is_file() for package in packages), name


def test_results_are_those_that_were_written():
    """The table in the README is the one that `compare` made, digit for digit."""
    import json

    from recipes.report import comparison_table

    path = ROOT / "results" / "compare.json"
    if not path.is_file():
        pytest.skip("results/compare.json is not there: make results writes it")
    assert comparison_table(json.loads(path.read_text())) in README
