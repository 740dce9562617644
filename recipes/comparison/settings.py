"""The settings of the comparison: rows that differ from another row in one option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from recipes.comparison.rows import ROWS, Row

_UNROLLED: Mapping[str, Any] = {"hypergradient": "unrolled", "order": "upper-first"}


@dataclass(frozen=True)
class Setting:
    """A row that varies one option of another.

    Attributes:
        group: What is varied.
        value: To what.
        of: The name of the row that has the usual value.
        row: What is trained.
    """

    group: str
    value: str
    of: str
    row: Row


def _varied(
    group: str, of: str, values: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Setting]]:
    for value, options in values.items():
        own = replace(ROWS[of], options={**ROWS[of].options, **options})
        yield _named(Setting(group, value, of, own))


def _named(setting: Setting) -> tuple[str, Setting]:
    words = f"{setting.of} {setting.group} {setting.value}"
    return "_".join("".join(c if c.isalnum() or c in ".-" else " " for c in words).split()), setting


def _all() -> Iterator[tuple[str, Setting]]:
    # Weights that may be negative have no mean to be divided by.
    bounds: Mapping[str, Mapping[str, Any]] = {
        "[0, 1]": {"bound_low": 0.0, "bound_high": 1.0, "prior": 0.5},
        "[0, 2], not normalised": {"normalise": "none"},
        "[-1, 3], not normalised": {"bound_low": -1.0, "bound_high": 3.0, "normalise": "none"},
        "none, not normalised": {"bound": "none", "normalise": "none"},
    }
    yield from _varied("bound", "instance_table", bounds)
    yield from _varied("prior", "instance_table", {"0.5": {"prior": 0.5}, "1.5": {"prior": 1.5}})
    windows = {str(k): {**_UNROLLED, "unroll_steps": k} for k in (1, 2, 5)}
    yield from _varied("lower steps in a window", "instance_table", windows)
    for of, usual in (("instance_table", 0.4), ("instance_net", 0.03)):
        values = ("auto", f"{0.1 * usual:g}", f"{10 * usual:g}")
        # Ten times the rate can bring single hypergradients that a run would stop at.
        rates = {rate: {"upper_lr": rate, "on_trouble": "skip"} for rate in values}
        yield from _varied("upper learning rate", of, rates)
    methods = ("no_selection", "instance_table", "instance_net", "clean_oracle")
    for share in (20, 40, 60):
        for of in methods:
            data, file = f"noise-{share}", ROWS[of].train.partition("/")[2]
            own = replace(ROWS[of], train=f"{data}/{file}", start=data)
            yield _named(Setting("corruption", f"{share} %", of, own))
    for count in (12, 25, 100):
        for of in ("instance_table", "meta_only"):
            own = replace(ROWS[of], meta=f"meta-{count}/meta")
            yield _named(Setting("meta solutions", str(4 * count), of, own))
    yield _named(
        Setting("cold start", "none", "instance_table", replace(ROWS["instance_table"], start=None))
    )
    features: Mapping[str, Mapping[str, Any]] = {
        "label": {"features": ("label",)},
        "label, p_label, p_plus": {"features": ("label", "p_label", "p_plus")},
        "gradient": {"features": ("gradient",)},
    }
    yield from _varied("features", "instance_net", features)
    differences: Mapping[str, Mapping[str, Any]] = {
        "float32 differences": {"route": "central-difference"},
        "bfloat16 differences of radius 0.01": {
            "route": "central-difference",
            "difference_radius": 0.01,
            "precision": "bf16-pure",
        },
    }
    yield from _varied("hypergradient", "instance_table", differences)
    stale = {str(n): {"order": "upper-first", "upper_gradient_every": n} for n in (1, 2, 5, 10)}
    yield from _varied("upper gradient every", "instance_table", stale)
    targets = {"both": {"loss_target": "both"}, "+ alone": {"loss_target": "+"}}
    yield from _varied("loss target", "instance_table", targets)
    by = {name: {"aggregation": name} for name in ("min", "last", "product")}
    yield from _varied("aggregation", "instance_table", by)


SETTINGS: Mapping[str, Setting] = dict(_all())
"""The settings by their names in ``compare.json``."""
