"""Small problems are measured side by side, all ways at the same hypergradient."""

from __future__ import annotations

import json

import torch

from recipes.evidence.small_problems import main, network, windows


def test_the_network_has_the_size_that_is_reported():
    assert sum(leaf.numel() for leaf in network(0).values()) == 1761


def test_all_ways_take_the_same_upper_step():
    for steps in (1, 3):
        found = {name: way() for name, way in windows(steps).items()}
        assert set(found) == {"by hand", "TorchOpt", "Unrolled()", *(["OneStep()"] * (steps == 1))}
        for logits in found.values():
            torch.testing.assert_close(logits, found["by hand"], rtol=1e-5, atol=1e-7)


def test_the_table_and_the_file(tmp_path, capsys):
    main(["--rounds", "1", "--output", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rounds"] == 1
    assert list(written["windows"]) == ["1 steps", "8 steps"]
    for rows in written["windows"].values():
        assert rows["by hand"]["times_by_hand"] == 1.0
        assert all(row["ms"] > 0.0 for row in rows.values())
    assert capsys.readouterr().out.count("x by hand") == 7
