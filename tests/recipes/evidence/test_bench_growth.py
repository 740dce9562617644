"""The measurement of growth: its rows can be trained on, and its figures are those of a process."""

from __future__ import annotations

import json

from prm.data.reader import read_jsonl
from recipes.evidence.bench_growth import main, measure_train, write_rows


def test_figures_of_both_commands(tmp_path, capsys):
    main(["--train-rows", "40", "--score-rows", "20", "--output", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())
    assert [(row["command"], row["rows"]) for row in results["rows"]] == [
        ("train", 40),
        ("score", 20),
    ]
    for row in results["rows"]:
        assert 0 < row["cpu_seconds"] < 600
        assert 0 <= row["bytes_beyond_model"] < row["peak_bytes"]
        assert row["file_bytes"] > 200 * row["rows"]
    assert "--train-rows 40 --score-rows 20" in results["command"]
    assert capsys.readouterr().out.count("s of computing") == 2


def test_rows_are_read_and_the_first_step_is_taken(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", 30)
    examples = read_jsonl(file)
    assert len({example.id for example in examples}) == 30
    assert {len(example.steps) for example in examples} <= {2, 3, 4, 5, 6}
    figures = measure_train(file, tmp_path)
    assert figures["cpu_seconds"] > 0
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1
