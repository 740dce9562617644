"""The measurement of kept activations: both models, the same steps, what is kept."""

from __future__ import annotations

import json

from recipes.evidence import bench_frozen
from recipes.evidence.bench.race.model import Shape


def test_figures_of_both_models(tmp_path, capsys, monkeypatch):
    tiny = Shape("tiny", 1, 28, 56, 64, 500, image=56, text=40, steps=2)
    monkeypatch.setattr(bench_frozen, "SHAPES", {"quarter": tiny})
    words = [
        "--layers",
        "2",
        "--trained",
        "1",
        "--batch-size",
        "2",
        "--batches",
        "1",
        "--epochs",
        "2",
    ]
    bench_frozen.main([*words, "--output", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())
    text, seen = results["rows"]
    assert text["model"] == "SmolLM2-135M's shape, 1 of 2 layers trained"
    lengths = bench_frozen.text_batch(2, 0)["attention_mask"].sum(1)
    assert text["kept_bytes_per_example"] == int(lengths.sum()) * 576 * 4 // 2
    assert seen["kept_bytes_per_example"] == tiny.image_tokens * tiny.hidden * 4
    printed = capsys.readouterr().out
    for row in results["rows"]:
        assert min(row["without"], row["first_epoch"], row["later"]) > 0
        assert f"| {row['model']} | 2 | {row['without']} | " in printed
    assert results["command"].endswith(f"--epochs 2 --output {tmp_path / 'out.json'}")
