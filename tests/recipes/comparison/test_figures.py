"""The figures draw the numbers of the comparison, each line and mark at its value."""

from __future__ import annotations

import json

import pytest

from recipes.comparison.figures import FIGURES, best_of_k, corruption, main, weights_by_source

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")


def run(accuracy: float = 0.0, **weights: float) -> dict:
    sources = {source: {"mean_weight": w} for source, w in weights.items()}
    return {"accuracy": accuracy, "sources": sources}


REPORT = {
    "best_of_k": {"instance_table": [0.4, 0.6, 0.7], "no_selection": [0.4, 0.35, 0.3]},
    "pass_at_k": [0.4, 0.8, 0.9],
    "runs": {
        "instance_net": [run(good=1.5, bad=0.5), run(good=1.7, bad=0.1)],
        "instance_table": [run(0.7, good=2.0, bad=0.0), run(0.1, good=2.0, bad=0.2)],
        "no_selection": [run(0.4), run(0.3)],
    },
    "settings": {
        "a": {"group": "corruption", "value": "20 %", "of": "instance_table", "per_seed": [0.9]},
        "b": {"group": "corruption", "value": "20 %", "of": "no_selection", "per_seed": [0.8, 0.6]},
        "c": {"group": "bound", "value": "none", "of": "no_selection", "per_seed": [0.1]},
    },
}


def lines(figure) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in figure.axes[0].lines
    }


def test_best_of_k_has_a_point_for_every_k():
    found = lines(best_of_k(REPORT))
    assert found == {
        "PRM: Instance Table": [(1, 0.4), (2, 0.6), (3, 0.7)],
        "PRM: No Selection": [(1, 0.4), (2, 0.35), (3, 0.3)],
        "oracle (pass@k)": [(1, 0.4), (2, 0.8), (3, 0.9)],
    }


def test_weights_are_means_over_seeds_and_bars_span_them():
    axes = weights_by_source(REPORT).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["good", "bad"]
    drawn = list(axes.containers)
    assert [list(bars.lines[0].get_ydata()) for bars in drawn] == [
        pytest.approx([1.6, 0.3]),
        pytest.approx([2.0, 0.1]),
    ]
    ends = drawn[0].lines[2][0].get_segments()[1]  # of Instance Net and the bad source
    assert sorted(y for _, y in ends) == pytest.approx([0.1, 0.5])


def test_corruption_ends_with_the_task_itself_on_the_same_seeds():
    found = lines(corruption(REPORT))
    assert found.pop("PRM: Instance Table") == [(20, 0.9), (70, 0.7)]
    (values,) = found.values()
    assert values == [(20, pytest.approx(0.7)), (70, pytest.approx(0.35))]


def test_all_figures_are_written(tmp_path, capsys):
    (tmp_path / "compare.json").write_text(json.dumps(REPORT))
    main(["--input", str(tmp_path / "compare.json"), "--output", str(tmp_path / "to")])
    written = sorted(path.name for path in (tmp_path / "to").iterdir())
    assert written == sorted(f"{name}.png" for name in FIGURES)
    for path in (tmp_path / "to").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
