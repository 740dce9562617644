"""``bilevel-prm evaluate``: read or score candidates, choose on the dev set, and report."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prm.data.bad_rows import BadRows
from prm.data.json_rows import json_rows
from prm.evaluation.second_opinion import load_math_verify
from prm.models.model import PRM
from prm.schema import DataError
from prm.scoring import StepScores
from recipes.bad_rows import report_bad_rows, skipped_path
from recipes.evaluation.candidates import Candidates, candidates_or_steps, scores_of
from recipes.evaluation.dev_choice import Choice, choose_on_dev
from recipes.evaluation.figures import all_figures
from recipes.evaluation.leaks import find_leak, refuse_leak
from recipes.evaluation.table import SANITY_CHECK, results_table
from recipes.models.loading import (
    Examples,
    Fault,
    Solutions,
    cut,
    load_model,
    placement_of,
    read_examples,
    read_solutions,
    set_up,
    usable,
)
from recipes.options.rules import check_together
from recipes.options.use import EvaluateOptions
from recipes.options.values import OptionError
from recipes.run.directory import run_of
from recipes.run.files import json_text, need_output_for_lists, output_file
from recipes.terminal import say
from recipes.use.scores_file import (
    ScoredSolution,
    is_of_file,
    numbered_scores,
    read_settings,
    scores_for,
    use_of,
)


class _Judge:
    """The model, which is loaded when it is first needed."""

    def __init__(self, options: EvaluateOptions) -> None:
        self.options = options

    @cached_property
    def loaded(self) -> tuple[PRM, dict[str, Tensor]]:
        return load_model(self.options, placement=placement_of(self.options.placement))

    def read(self, path: str, scores: str | None) -> Candidates:
        """Return candidates, tokenised only if they have to be scored."""
        if scores is not None:
            data = read_solutions(self.options, path)
            return candidates_or_steps(as_scored(without_skipped(data, Path(scores)), Path(scores)))
        return candidates_or_steps(read_examples(self.loaded[0], self.options, path))

    def rows(self, candidates: Candidates, scores: str | None) -> Sequence[Tensor]:
        """Return the step scores of every candidate, read or computed."""
        data = candidates.data
        if scores is not None:
            return _read_rows(self.options, Path(scores), candidates)
        assert isinstance(data, Examples)
        full_vocab = self.loaded[0].usage.probability == "vocabulary"
        return scores_of(*self.loaded, data, self.options, full_vocab=full_vocab)

    def choice(self) -> Choice:
        """Return the aggregation and threshold of the options, or else of the model."""
        options = self.options
        if options.scores is not None:
            aggregation, threshold = use_of(Path(options.scores))
        else:
            usage = self.loaded[0].usage
            aggregation, threshold = usage.aggregation, usage.threshold
        return Choice(
            options.aggregation or aggregation,
            threshold if options.threshold is None else options.threshold,
        )


def run_evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Report on ``--file``, and return the content of the results file.

    Raises:
        OptionError: Options contradict each other, or the file shares questions with the dev or
            meta set, or the output exists already or cannot be written.
        DataError: A record, or a line of scores, cannot be used.
        OSError: The output cannot be written.
    """
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise OptionError(f"--threshold: expected a number in [0, 1], found {options.threshold}")
    check_together(options)
    set_up(options)
    output = None
    if options.output is not None:
        output = output_file(
            "--output",
            options.output,
            overwrite=options.overwrite,
            inputs=(
                *(options.file, options.scores, options.baseline_scores, options.meta_file),
                *(() if options.dev is None else (options.dev, options.dev_scores)),
            ),
        )
    written = None if output is None else output.path
    need_output_for_lists(options, written)
    judge = _Judge(options)
    candidates = judge.read(options.file, options.scores)
    if options.equal_answers == "math-verify":
        try:
            candidates = replace(candidates, same_answer=load_math_verify())
        except ModuleNotFoundError as error:
            raise OptionError(f"--equal-answers math-verify: {error}") from error
    _check_what_the_file_has(options, candidates)
    dev = None if options.dev is None else judge.read(options.dev, options.dev_scores)
    tuned_on = _tuned_on(options, candidates, dev)
    choice = judge.choice()
    if dev is not None:
        choice = choose_on_dev(dev, judge.rows(dev, options.dev_scores), options.tie)
        if choice.dev and not choice.dev["accuracy"] and choice.dev["step_macro_f1"] is None:
            raise OptionError(
                f"--dev {options.dev}: has nothing to choose by: give rows with `group` and "
                "`correct`, or with labels of right and of wrong steps"
            )
    baseline = None
    if options.baseline_scores is not None:
        baseline = _read_rows(options, Path(options.baseline_scores), candidates)
    row = f"prm{SANITY_CHECK}" if options.sanity_check else "prm"
    rows = judge.rows(candidates, options.scores)
    results = all_figures(candidates, rows, choice, options.tie, row, baseline)
    results |= {"sanity_check": options.sanity_check, "tuned_on_these_questions": tuned_on}
    read = [one.data.bad for one in (candidates, dev) if one is not None]
    report_bad_rows(read, written, say)
    table = f"{results_table(results)}\n" if results["n_mixed_questions"] else ""
    page = table + _summary(results)
    if output is None:
        print(page)
        print(json.dumps({k: v for k, v in results.items() if k not in ("rows", "ci95")}))
    else:
        print(page, file=sys.stderr if output.path is None else sys.stdout)
        output.write_text(json_text(results))
    return results


def _check_what_the_file_has(options: EvaluateOptions, candidates: Candidates) -> None:
    """Refuse options on a selection among candidates, where the rows are none.

    Raises:
        OptionError: There is such an option.
    """
    if candidates.groups:
        return
    given = {
        "--baseline-scores": options.baseline_scores is not None,
        "--tie": options.tie != "expected",
        "--equal-answers": options.equal_answers != "text",
    }
    if flags := ", ".join(flag for flag, is_given in given.items() if is_given):
        raise OptionError(
            f"{flags}: no effect: no row of {options.file} has both `group` and `correct`, so that "
            "nothing is selected. Leave out, or add the fields"
        )


def _tuned_on(
    options: EvaluateOptions, candidates: Candidates, dev: Candidates | None
) -> list[str]:
    """Return the sets that share questions with ``--file``; only a sanity check has any."""
    held_out = f"--file {options.file}"
    others = [] if dev is None else [(f"--dev {options.dev}", dev.data)]
    meta = options.meta_file
    if meta is None:
        model = options.model
        if options.scores is not None:
            model = str(read_settings(Path(options.scores)).get("model", {}).get("path", ""))
        meta = run_of(model).get("meta_file") if model else None
        if meta is not None and not Path(meta).is_file():
            print(f"note: {meta}, the meta set of the model's run, is not there to compare with")
            meta = None
    if meta is not None:
        others.append((f"meta set {meta}", read_solutions(options, meta)))
    shared = []
    for name, data in others:
        leak = find_leak(data.examples, candidates.data.examples, data.path, candidates.data.path)
        refuse_leak(leak, name, held_out, sanity_check=options.sanity_check)
        if leak:
            shared.append(f"{name} {leak}")
    return shared


def without_skipped(data: Solutions, scores: Path) -> Solutions:
    """Return the solutions without those that ``score`` left out when it wrote ``scores``.

    Raises:
        DataError: There are such solutions, and bad rows are refused.
    """
    listed = skipped_path(scores)
    if not listed.is_file():
        return data
    entries = [entry for _, entry in json_rows(listed) if isinstance(entry, dict)]
    skipped = {entry.get("id") for entry in entries}
    fault = Fault(
        field="id",
        expected=f"a solution with scores in {scores}",
        found=f"one that `score` left out, as {listed} says",
        remedy="leave it out here, too: --on-bad-row skip",
    )
    return usable(data, lambda example: fault if example.id in skipped else None)


def as_scored(data: Solutions, scores: Path) -> Solutions:
    """Return the solutions with those steps alone that ``score`` kept when it wrote ``scores``."""
    if read_settings(scores).get("too_long") != "truncate":
        return data
    scored = numbered_scores(scores, BadRows(scores))
    kept = {row.id: row for _, row in scored if row.steps is not None}
    cuts: dict[int, int] = {}
    for number, (example, line) in enumerate(zip(data.facts, data.lines, strict=True)):
        row = kept.get(example.id)
        if row is not None and row.steps == len(example.labels):
            data.bad.truncate(line, example.id, row.steps, len(row.step_scores))
            cuts[number] = len(row.step_scores)
    return cut(data, cuts)


def _read_rows(options: EvaluateOptions, path: Path, candidates: Candidates) -> Sequence[Tensor]:
    """Return the step scores of every candidate from a scores file, in float32.

    Raises:
        DataError: Steps have no scores, because the solutions have changed, or because they are
            longer than the context of the model that scored them and this is refused.
    """
    expected = candidates.all_steps
    values = array("f")  # in the order of the file
    starts, sizes = array("q", [0]) * len(expected), array("q", [0]) * len(expected)
    shortened = 0
    wrong: tuple[int, DataError] | None = None  # the first by the order of the data
    data = candidates.data
    if is_of_file(path, data.path) is False:
        say(
            f"note: {path} was made from another file than {data.path}, or from this one before it "
            "was changed: ids and numbers of steps are compared, what the steps say is not. Score "
            "the file again unless nothing but answers or labels changed",
            error=True,
        )
    left_out = bool(data.bad.left_out)
    for row, solution in scores_for(path, data.index(), data.path, some_left_out=left_out):
        starts[row], sizes[row] = len(values), len(solution.step_scores)
        values.extend(solution.step_scores)
        shortened += solution.steps is not None
        error = _wrong_steps(options, solution, expected[row], path)
        if error is not None and (wrong is None or row < wrong[0]):
            wrong = row, error
    if wrong is not None:
        raise wrong[1]
    if shortened:
        say(f"{path}: {shortened} of {len(sizes)} solutions have scores of their first steps alone")
    scores = StepScores(sizes)
    for row, start in enumerate(starts):
        scores.put(row, torch.tensor(values[start : start + sizes[row]]))
    return scores


def _wrong_steps(
    options: EvaluateOptions, solution: ScoredSolution, steps: int, path: Path
) -> DataError | None:
    if solution.all_steps != steps:
        return DataError(
            expected=f"{steps} step scores for {solution.id!r}, one per step",
            found=f"{solution.all_steps}",
            file=path,
            remedy="score this file again; its solutions have changed",
        )
    if solution.steps is not None and options.too_long == "refuse":
        return DataError(
            expected=f"a score for each of the {steps} steps of {solution.id!r}",
            found=f"{len(solution.step_scores)}: it is longer than the model's context",
            file=path,
            remedy="judge such solutions by their first steps alone with --too-long truncate",
        )
    return None


def _summary(results: dict[str, Any]) -> str:
    chosen = results["dev"]
    lines = [
        f"{results['n_questions']} questions, aggregation {results['aggregation']}, threshold "
        f"{results['threshold']:.3g}"
        + (f", chosen on {chosen['file']}" if chosen else "")
        + (f", ties {results['tie']}" if results["n_mixed_questions"] is not None else "")
    ]
    lines += _selection_notes(results)
    for name, entry in results["difference"].items():
        low, high = entry["ci95"]
        lines.append(
            f"minus {name}: {entry['difference']:+.3f} [{low:+.3f}, {high:+.3f}], better on "
            f"{entry['better']}, worse on {entry['worse']} (McNemar p = {entry['mcnemar_p']:g})"
        )
    if results["n_mixed_questions"]:
        lines.append("best of k: " + " ".join(f"{value:.3f}" for value in results["best_of_k"]))
    for name, entry in (("solutions", results["solutions"]), ("steps", results["steps"])):
        if entry["auc"] is not None:
            low, high = entry["auc_ci95"]
            macro = f"macro F1 {entry['macro_f1']:.3f}, " if "macro_f1" in entry else ""
            lines.append(
                f"{name}: AUC {entry['auc']:.3f} [{low:.3f}, {high:.3f}], {macro}"
                f"ECE {entry['ece']:.3f}, Brier {entry['brier']:.3f}"
            )
    lines += _benchmark_lines(results["steps"], detailed=results["n_mixed_questions"] is None)
    for shared in results["tuned_on_these_questions"]:
        lines.append(f"SANITY CHECK, an upper bound: {shared} with the questions judged here")
    return "\n".join(lines)


def _selection_notes(results: dict[str, Any]) -> list[str]:
    """Return what is to be said on the candidates, before they are compared."""
    mixed, questions = results["n_mixed_questions"], results["n_questions"]
    notes = []
    if mixed is None:
        notes.append("no row has both group and correct: figures of steps, no selection")
    elif not mixed:
        notes.append(
            "no question is mixed: the candidates of each are all right or all wrong, and whatever "
            f"is selected the accuracy is {results['rows']['pass@1']:.3f}"
        )
    if cut := results["n_truncated"]:
        notes.append(
            f"{cut} of {results['n_solutions']} solutions are longer than the model's context, and "
            "judged by their first steps alone"
        )
    if several := results["n_contradictory_questions"]:
        notes.append(
            f"{several} of {questions} questions have one answer that is right in one candidate "
            "and wrong in another"
        )
    if alike := results["n_groups_alike"]:
        notes.append(
            f"{alike} of {questions} groups are another one but for case, white space or Unicode "
            "form, and count as questions of their own; `bilevel-prm data validate` says where"
        )
    if without := results["n_without_answer"]:
        empty = results["n_questions_without_vote"]
        votes = ""
        if empty == questions:
            votes = "; there is no majority"
        elif empty:
            votes = f"; votes are of the {questions - empty} questions with an answer"
        notes.append(
            f"{without} of {results['n_solutions']} candidates have no answer, and no vote{votes}"
        )
    return notes


def _benchmark_lines(steps: dict[str, Any], *, detailed: bool) -> list[str]:
    """Return the figures of step benchmarks, by domain if the file is one."""
    lines = []
    process, visual = steps["process_bench"], steps["visual_process_bench"]
    if process is not None:
        lines.append(f"ProcessBench F1, mean over domains: {process['mean_f1']:.3f}")
        if detailed:
            lines += [
                f"  {name}: F1 {entry['f1']:.3f}, accuracy {entry['accuracy_erroneous']:.3f} on "
                f"{entry['erroneous']} erroneous and {entry['accuracy_correct']:.3f} on "
                f"{entry['correct']} correct solutions"
                for name, entry in process["per_domain"].items()
            ]
    alone = steps["process_bench_of_one_kind"] if detailed else {}
    for name, entry in alone.items():
        missing = "correct" if entry["kind"] == "erroneous" else "erroneous"
        lines.append(
            f"{'  ' if process else 'ProcessBench, '}{name}: no F1, as there is no {missing} "
            f"solution; accuracy {entry['accuracy']:.3f} on {entry['solutions']} {entry['kind']} "
            f"solution{'' if entry['solutions'] == 1 else 's'}"
        )
    first_errors_only = (process is not None or alone) and not steps["labelled_after_an_error"]
    if visual is not None and detailed and not first_errors_only:
        domains = ", ".join(f"{name} {value:.3f}" for name, value in visual["per_domain"].items())
        lines.append(
            f"VisualProcessBench macro F1: {visual['macro_f1']:.3f} over all steps ({domains})"
        )
    if detailed and visual is None:
        kind = "none is labelled"
        if steps["labelled"]:
            side = "right" if steps["right"] else "wrong"
            kind = f"all {steps['labelled']} labelled ones are {side}"
        lines.append(f"steps: no AUC and no macro F1: {kind}")
    return lines
