"""Tables of results for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.evaluation.beside import Beside

NAMES = {
    "pass@1": "pass@1 (random candidate)",
    "self_consistency": "self-consistency (majority)",
    "weighted_vote": "vote weighted by scores",
    "prm": "PRM",
    "baseline": "PRM: baseline scores",
    "base": "PRM: base model",
    "cold_start": "PRM: cold start",
    "no_selection": "PRM: No Selection",
    "instance_table": "PRM: Instance Table",
    "instance_net": "PRM: Instance Net",
    "domain_table": "PRM: Domain Table",
    "loss_net": "PRM: Net on the loss alone (Meta-Weight-Net)",
    "table_sanity": "PRM: Table, meta set = dev set",
    "net_sanity": "PRM: Net, meta set = dev set",
    "all_data": "PRM: No Selection on four times the data",
    "step_labels": "PRM: learned labels",
    "fixed_weights": "PRM: given weights",
    "clean_oracle": "PRM: clean labels only (ceiling)",
    "clean": "PRM: clean labels only (ceiling)",
    "shuffled_table": "control: Table's weights shuffled",
    "shuffled_net": "control: Net's weights shuffled",
    "small_loss": "control: small-loss filter",
    "bis": "control: Balanced-Information Score",
    "nait": "control: labels corrected by NAIT",
    "meta_only": "control: fine-tuning on the meta set",
    "outcome_model": "control: outcome reward model of the meta set",
    "from_base": "control: No Selection from the base model",
}
"""Labels of the rows of ``results.json`` in a table; pass@N rows are named by their N."""
DEV_STOPPED = "_dev_stopped"
"""Suffix of the name of a row whose model is that of the best step on the dev set."""
SANITY_CHECK = "_sanity_check"
"""Suffix of the name of a row whose meta or dev set shares questions with the test set."""


def results_table(results: Mapping[str, Any], beside: Beside | None = None) -> str:
    """Return the accuracy of every row with its 95 % interval, in the order of ``NAMES``.

    Args:
        results: The ``results.json`` of a run.
        beside: Rows of a comparison on the same test file, which are marked as such.
    """
    intervals = results.get("ci95", {})
    lines = [f"{'best-of-N accuracy':<38}{'mean':>7}   95 % interval"]
    others = {} if beside is None else beside.rows
    rows = {**others, **results["rows"]}
    order: Sequence[str] = [*(name for name in NAMES if name in rows)]
    order = [*order, *(name for name in rows if name not in NAMES)]
    for name in order:
        line = f"{label_of(name):<38}{rows[name]:>7.3f}"
        if name in results["rows"]:
            low, high = intervals.get(name, (float("nan"), float("nan")))
            line += f"   [{low:.3f}, {high:.3f}]"
        else:
            line += "   *"
        lines.append(line)
    if beside is not None:
        lines.append(f"* last model of another run on the same test file: {beside.source}")
    return "\n".join(lines)


def comparison_table(report: Mapping[str, Any]) -> str:
    """Return a comparison over seeds as a Markdown table, with differences to No Selection."""
    lines = [
        "| row | accuracy | 95 % interval | minus No Selection | 95 % interval | gap closed |",
        "|---|---|---|---|---|---|",
    ]
    order = [name for name in NAMES if name in report["rows"]]
    order += [name for row in NAMES if (name := row + DEV_STOPPED) in report["rows"]]
    order += [name for name in report["rows"] if name not in order]
    for name in order:
        low, high = report["ci95"][name]
        cells = [label_of(name), f"{report['rows'][name]:.3f}", f"[{low:.3f}, {high:.3f}]"]
        if name in report.get("difference", {}):
            low, high = report["difference_ci95"][name]
            cells += [f"{report['difference'][name]:+.3f}", f"[{low:+.3f}, {high:+.3f}]"]
        else:
            cells += ["", ""]
        closed = report.get("gap_closed", {}).get(name)
        cells.append(f"{100 * closed:.0f} %" if closed is not None else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def settings_table(report: Mapping[str, Any]) -> str:
    """Return the settings of a comparison as a Markdown table, each below the row it varies.

    Accuracies are of models stopped on dev; the row with the usual value is on the same seeds.
    """
    lines = [
        "| varied | value | row | accuracy | minus the usual | 95 % interval | last model |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in report["settings"].values():
        low, high = setting["difference_ci95"]
        cells = [
            setting["group"],
            setting["value"],
            label_of(setting["of"]),
            f"{setting['accuracy']:.3f}",
            f"{setting['difference']:+.3f}",
            f"[{low:+.3f}, {high:+.3f}]",
            f"{setting['last']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def label_of(name: str) -> str:
    """Return the label of a row of ``results.json`` in a table."""
    if name.endswith(DEV_STOPPED):
        return f"{label_of(name.removesuffix(DEV_STOPPED))}, stopped on dev"
    if name.endswith(SANITY_CHECK):
        return f"{label_of(name.removesuffix(SANITY_CHECK))}, SANITY CHECK"
    return NAMES.get(name, f"{name} (oracle)" if name.startswith("pass@") else name)
