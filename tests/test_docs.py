"""A stranger finds each idea of the paper by its name, one link from the README's map."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IDEAS = (
    "time-scale matching",
    "bounded weights",
    "cold start",
    "Instance Net",
    "step score",
    "best-of-N",
    "hypergradient through AdamW",
    "replay memory",
)


def one_hop() -> dict[str, list[str]]:
    """Idea -> paths beside it, in the tables of the pages that the README's map links to."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## What is where\n")[1].split("\n## ")[0]
    found: dict[str, list[str]] = {}
    for page in re.findall(r"\]\((?!https?:)([^)#]+)", section):
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            if line.startswith("| "):
                idea, *cells = (cell.strip() for cell in line.strip("|").split("|"))
                found[idea] = re.findall(r"`([\w./-]+/[\w.]*)`", " ".join(cells))
    return found


def test_the_map_has_four_lines():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## What is where\n")[1].split("\n## ")[0]
    folders = re.findall(r"^- `(\w+)/`", section, re.MULTILINE)
    assert folders == ["bilevel", "weighting", "prm", "recipes"]


@pytest.mark.parametrize("idea", IDEAS)
def test_an_idea_is_found_by_its_name(idea):
    paths = one_hop()[idea]
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_layers_are_those_that_are_held():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split("\n| package | layers")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", table.replace("`", ""), re.MULTILINE))
    module = ast.parse((ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    (layers,) = (
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    )
    assert {
        name: [layer.split(", ") for layer in row.split(" < ")] for name, row in rows.items()
    } == {name: [list(layer) for layer in row] for name, row in layers.items()}


def test_the_name_of_the_file_is_that_of_the_idea():
    """Where the idea is a module of its own, its first path says so."""
    first = {idea: Path(paths[0]).stem for idea, paths in one_hop().items() if paths}
    assert first["time-scale matching"] == "time_scale"
    assert first["bounded weights"] == "bounded_weights"
    assert first["cold start"] == "cold_start"
    assert first["Instance Net"] == "instance_net"


def test_the_version_is_the_same_everywhere():
    (version,) = re.findall(r"^version = (.*)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## ([\d.]+)", changes, re.MULTILINE)[0] == version
