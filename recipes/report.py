"""The results table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {
    "pass@1": "pass@1 (random candidate)",
    "self_consistency": "self-consistency (majority)",
    "base": "PRM: base model",
    "cold_start": "PRM: cold start",
    "no_selection": "PRM: No Selection",
    "instance_table": "PRM: Instance Table",
    "instance_net": "PRM: Instance Net",
    "domain_table": "PRM: Domain Table",
    "clean_oracle": "PRM: clean labels only (ceiling)",
    "shuffled_table": "control: Table's weights shuffled",
    "shuffled_net": "control: Net's weights shuffled",
    "small_loss": "control: small-loss filter",
    "meta_only": "control: fine-tuning on the meta set",
}
"""Row name in ``results.json`` -> what the table says; pass@N rows are named by their N."""


def results_table(results: Mapping[str, Any]) -> str:
    """Accuracy of every row with its 95 % interval over questions, worst first as listed."""
    intervals = results.get("ci95", {})
    lines = [f"{'best-of-N accuracy':<38}{'mean':>7}   95 % interval"]
    order: Sequence[str] = [*(name for name in NAMES if name in results["rows"])]
    order = [*order, *(name for name in results["rows"] if name not in NAMES)]
    for name in order:
        low, high = intervals.get(name, (float("nan"), float("nan")))
        label = NAMES.get(name, f"{name} (oracle)" if name.startswith("pass@") else name)
        lines.append(f"{label:<38}{results['rows'][name]:>7.3f}   [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)
