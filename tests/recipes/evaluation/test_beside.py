"""Rows of a comparison are shown only where the very same test file was scored."""

from __future__ import annotations

import hashlib
import json

import pytest

from recipes.evaluation.beside import Beside, rows_beside
from recipes.evaluation.table import results_table
from recipes.options.values import OptionError


@pytest.fixture
def files(tmp_path):
    tests = [tmp_path / f"test-{seed}.jsonl" for seed in (3, 4)]
    for seed, test in zip((3, 4), tests, strict=True):
        test.write_text(f"{seed}\n")
    report = {
        "test_sha256": {
            str(seed): hashlib.sha256(f"{seed}\n".encode()).hexdigest() for seed in (3, 4)
        },
        "per_seed": {"no_selection": [0.25, 0.5], "clean_oracle": [0.75, 1.0], "other": [0, 0]},
    }
    (tmp_path / "compare.json").write_text(json.dumps(report))
    return tmp_path / "compare.json", tests


def test_the_seed_is_found_by_the_content_of_the_test_file(files):
    path, tests = files
    found = rows_beside(str(path), str(tests[1]))
    rows = {"no_selection": 0.5, "clean_oracle": 1.0}
    assert found == Beside(f"{path}, seed 4", rows)
    tests[1].write_text("4 \n")
    assert rows_beside(str(path), str(tests[1])) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"test_sha256": {"0": "a"}}', '{"test_sha256": 3, "per_seed": {}}']
)
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "compare.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=r"expected the compare\.json of"):
        rows_beside(str(path), str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"--compare-with nothing\.json: .*No such file"):
        rows_beside("nothing.json", str(tmp_path))


def test_its_rows_stand_in_the_table_and_are_marked():
    results = {
        "rows": {"pass@1": 0.4, "instance_net": 0.8, "pass@8": 0.9},
        "ci95": {"pass@1": [0.3, 0.5], "instance_net": [0.7, 0.85], "pass@8": [0.8, 1.0]},
    }
    beside = Beside("compare.json, seed 4", {"no_selection": 0.5, "clean_oracle": 1.0})
    lines = results_table(results, beside).splitlines()[1:]
    assert [line.split() for line in lines[1:4]] == [
        ["PRM:", "No", "Selection", "0.500", "*"],
        ["PRM:", "Instance", "Net", "0.800", "[0.700,", "0.850]"],
        ["PRM:", "clean", "labels", "only", "(ceiling)", "1.000", "*"],
    ]
    assert lines[-1] == "* last model of another run on the same test file: compare.json, seed 4"
