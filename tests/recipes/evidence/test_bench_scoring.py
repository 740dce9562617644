"""The scoring benchmark compares like with like."""

from __future__ import annotations

import json

import pytest

from prm.data.reader import read_jsonl
from recipes.evidence import bench_scoring
from recipes.evidence.bench_scoring import compare, table, wide_vocabulary_model


@pytest.fixture(scope="module")
def found(task):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_scoring, "VOCABULARY", 2000)
        prm = wide_vocabulary_model()
        assert prm.model.get_output_embeddings().weight.shape[0] == 2000
        examples = read_jsonl(task.data / "dev.jsonl")
        return compare(prm, examples, 4, 1, report=lambda _: None)


def test_the_same_numbers_come_out(found):
    original, single, batched, labels, trees = found["rows"]
    assert original["largest_difference"] == 0.0
    assert 0 <= single["largest_difference"] < 1e-8  # of probabilities near 1/2000
    assert 0 <= batched["largest_difference"] < 1e-8
    assert labels["largest_difference"] is trees["largest_difference"] is None
    assert found["steps"] > found["solutions"] == 8


def test_the_vocabulary_costs_memory_at_every_token(found):
    original, single, *_ = found["rows"]
    assert original["speedup"] == original["peak_ratio"] == 1.0
    # Logits and probabilities of every token, float32, are alive together.
    assert original["peak_bytes"] > 2 * found["tokens"]["mean"] * 2000 * 4
    assert single["peak_bytes"] < original["peak_bytes"]


def test_the_report_holds_every_row(found):
    json.dumps(found, allow_nan=False)
    lines = table(found).splitlines()
    assert len(lines) == 2 + len(found["rows"])
    assert all(row["name"] in line for row, line in zip(found["rows"], lines[2:], strict=True))
