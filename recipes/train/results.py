"""The results of a training run: its row, every question's outcome, and a summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel import ShardedModule
from prm.conventions import FILE, write_conventions
from prm.models.adapters import save_adapter
from prm.models.model import PRM, save_prm
from recipes.evaluation.beside import Beside
from recipes.evaluation.candidates import evaluate, report_of, values_of
from recipes.evaluation.card import CARD, model_card
from recipes.evaluation.figures import curves
from recipes.evaluation.table import SANITY_CHECK, results_table
from recipes.method.bounded_weights import WEIGHTINGS
from recipes.options.parse import saved_options
from recipes.options.train import LowerOptions, TrainOptions
from recipes.run.files import write_text
from recipes.run.show import json_object
from recipes.train.data import TrainData
from recipes.train.reports.labels import label_lines
from recipes.train.sharding import save_spread

_EXPLAINED = 0.8  # rank correlation from which on labels explain the weights


def save_trained(
    prm: PRM,
    params: Mapping[str, Tensor],
    options: LowerOptions,
    directory: Path,
    *,
    writes: bool = True,
    shards: ShardedModule | None = None,
) -> Path:
    """Write the trained model to ``model``, and adapters to ``adapter``, as ``--lora-save`` says.

    Args:
        prm: The model.
        params: The trained parameters.
        options: The options of the run.
        directory: The run directory.
        writes: Whether this process does; the others of a run over ranks do not.
        shards: The parts of the model, if it is spread over the ranks, which all call this then.

    Returns:
        The directory that was written; of two the model's.
    """
    if shards is not None:
        save_spread(prm, shards, directory / "model", writes=writes)
        return directory / "model"
    if not writes:
        alone = options.lora.rank and options.lora.save == "adapter"
        return directory / ("adapter" if alone else "model")
    if options.lora.rank:
        started = options.init_from if isinstance(options, TrainOptions) else None
        base = options.model if started is None else started
        if options.lora.save != "merged":
            save_adapter(prm.model, params, directory / "adapter", base)
        if options.lora.save == "adapter":
            return directory / "adapter"
    save_prm(prm, params, directory / "model")
    return directory / "model"


def row_name(options: TrainOptions) -> str:
    """Return the row of ``results.json`` for a run; the name marks a sanity check."""
    if options.weighting.weights_file is not None:
        return "fixed_weights"
    if options.weighting.lower_data == "meta":
        name = "meta_only"
    else:
        none = options.weighting.kind == "none"
        name = "no_selection" if none else WEIGHTINGS[options.weighting.kind].row
    return name + SANITY_CHECK if options.data.sanity_check else name


def evaluate_all(
    prm: PRM,
    lower: Mapping[str, Tensor],
    data: TrainData,
    options: TrainOptions,
    directory: Path,
) -> dict[str, Any]:
    """Score every file of candidates, and write ``<file>_questions.jsonl``.

    The conventions of the saved model get the threshold that is best on the development set.

    Returns:
        Their entries of ``results.json``: the test set at the top level, others under their names.
    """
    row = row_name(options)
    results: dict[str, Any] = {"sanity_check": True} if options.data.sanity_check else {}
    for name, candidates in data.evaluations.items():
        evaluation = evaluate(prm, lower, candidates, options)
        if name == "dev" and evaluation.threshold is not None and (directory / "model").is_dir():
            chosen = replace(prm.usage, threshold=evaluation.threshold)
            write_conventions(directory / "model" / FILE, chosen)
        values = values_of(candidates, evaluation, row)
        report = report_of(candidates, evaluation, values)
        report |= curves(candidates, evaluation.scores)
        results |= report if name == "test" else {name: report}
        lines = [
            json.dumps(
                {"question": str(candidates.data.examples[rows[0]].group)}
                | {
                    key: float(value[question])
                    for key, value in values.items()
                    if value[question] == value[question]  # NaN: no candidate has an answer
                }
            )
            for question, rows in enumerate(candidates.groups)
        ]
        write_text(directory / f"{name}_questions.jsonl", "\n".join(lines) + "\n")
    return results


def write_card(directory: Path, results: Mapping[str, Any]) -> None:
    """Write the model card into ``model``, if this process has written that.

    Args:
        directory: The run directory, complete but for ``results.json``.
        results: What that will hold.

    Raises:
        OSError: It cannot be written. An older one is unchanged.
    """
    model = directory / "model"
    if not model.is_dir():
        return
    files = {name: json_object(model / name) or {} for name in ("config.json", FILE)}
    environment = json_object(directory / "env.json") or {}
    args = saved_options(directory)
    write_text(model / CARD, model_card(directory.name, args, environment, results, files))


def print_summary(
    results: Mapping[str, Any], directory: Path, beside: Beside | None = None
) -> None:
    """Print the ``results.json`` of a complete run, with rows of others on the same test file."""
    if results["rows"]:
        print(f"\n{results['n_questions']} test questions")
        print(results_table(results, beside))
        if results["step_auc"] is not None:
            print(f"step AUC {results['step_auc']:.3f}, macro F1 {results['step_macro_f1']:.3f}")
    if (chosen := results.get("model_selection")) is not None:
        best, last = chosen["best"], chosen["last"]
        print(
            f"\ndev best-of-N {best['best_of_n']:.4f} after step {best['step']}, the best, and "
            f"{last['best_of_n']:.4f} after step {last['step']}, the last; the model is that of "
            f"step {chosen['step']}"
        )
    if (labels := results.get("labels")) is not None:
        print("\n" + "\n".join(label_lines(labels)))
    if "weight_auc" in results:
        print(f"\nAUC of the weights, right against wrong labels: {results['weight_auc']:.3f}")
        for source, entry in results["sources"].items():
            auc = f", AUC {entry['auc']:.3f}" if "auc" in entry else ""
            print(f"  {source:<12}mean weight {entry['mean_weight']:.2f}{auc}")
    if (correlation := results.get("weight_label_correlation")) is not None:
        print(f"\nrank correlation of weights with the share of + labels: {correlation:.2f}")
        if abs(correlation) >= _EXPLAINED:
            print(
                "warning: the labels alone nearly explain the weights, so that these hardly tell "
                "right from wrong ones. Compare with --features that leave labels out"
            )
    for text in results.get("signs", {}).values():
        print(f"\nwarning: {text}")
    print_troubles(results["troubles"])
    parts = ", ".join(f"{name.replace('_', ' ')} {s:.0f}" for name, s in results["seconds"].items())
    print(f"\nseconds: {parts}\nrun directory: {directory}")


def print_troubles(counts: Mapping[str, int]) -> None:
    """Print the number of numerical troubles of each kind, if there were any."""
    if counts:
        listed = ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in counts.items())
        print(f"\ntroubles: {listed}")
