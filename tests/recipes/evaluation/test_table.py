"""Tables to the letter."""

from __future__ import annotations

from recipes.evaluation.table import (
    NAMES,
    comparison_table,
    label_of,
    results_table,
    settings_table,
)


def test_results_table():
    table = results_table(
        {
            "rows": {"instance_net": 0.8125, "pass@8": 1.0, "pass@1": 0.5, "fixed_weights": 0.25},
            "ci95": {
                "instance_net": [0.7, 0.9],
                "pass@8": [1.0, 1.0],
                "pass@1": [0.4, 0.6],
                "fixed_weights": [0.2, 0.3],
            },
        }
    )
    assert table.splitlines() == [
        "best-of-N accuracy                       mean   95 % interval",
        "pass@1 (random candidate)               0.500   [0.400, 0.600]",
        "PRM: Instance Net                       0.812   [0.700, 0.900]",
        "PRM: given weights                      0.250   [0.200, 0.300]",
        "pass@8 (oracle)                         1.000   [1.000, 1.000]",
    ]


def test_comparison_table():
    table = comparison_table(
        {
            "rows": {"pass@8": 1.0, "instance_net": 0.75, "no_selection": 0.5, "clean_oracle": 0.9},
            "ci95": {
                "pass@8": [1.0, 1.0],
                "instance_net": [0.7, 0.8],
                "no_selection": [0.45, 0.55],
                "clean_oracle": [0.85, 0.95],
            },
            "difference": {"instance_net": 0.25, "pass@8": 0.5, "clean_oracle": 0.4},
            "difference_ci95": {
                "instance_net": [-0.01, 0.3],
                "pass@8": [0.45, 0.55],
                "clean_oracle": [0.35, 0.45],
            },
            "gap_closed": {"instance_net": 0.625, "clean_oracle": 1.0},
        }
    )
    lines = table.splitlines()
    assert lines[0] == (
        "| row | accuracy | 95 % interval | minus No Selection | 95 % interval | gap closed |"
    )
    assert lines[2:] == [
        "| PRM: No Selection | 0.500 | [0.450, 0.550] |  |  |  |",
        "| PRM: Instance Net | 0.750 | [0.700, 0.800] | +0.250 | [-0.010, +0.300] | 62 % |",
        "| PRM: clean labels only (ceiling) | 0.900 | [0.850, 0.950] | +0.400 | [+0.350, +0.450] "
        "| 100 % |",
        "| pass@8 (oracle) | 1.000 | [1.000, 1.000] | +0.500 | [+0.450, +0.550] |  |",
    ]
    assert {line.count("|") for line in lines} == {7}


def test_labels():
    assert label_of("pass@16") == "pass@16 (oracle)"
    assert label_of("pass@1") == NAMES["pass@1"] == "pass@1 (random candidate)"
    assert label_of("something new") == "something new"


def test_settings_table():
    setting = {
        "group": "bound",
        "value": "none",
        "of": "instance_table",
        "accuracy": 0.75,
        "last": 0.7,
        "difference": -0.0551,
        "difference_ci95": [-0.09, 0.001],
    }
    assert settings_table({"settings": {"table_bound_none": setting}}).splitlines()[2:] == [
        "| bound | none | PRM: Instance Table | 0.750 | -0.055 | [-0.090, +0.001] | 0.700 |"
    ]
