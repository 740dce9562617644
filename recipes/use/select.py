"""``bilevel-prm select``: select the best candidate of every question from a scores file."""

from __future__ import annotations

import json
from pathlib import Path

from prm.evaluation.select import best_candidate
from prm.schema import DataError
from recipes.bad_rows import bad_rows_of, report_bad_rows
from recipes.options.use import SelectOptions
from recipes.options.values import OptionError, did_you_mean
from recipes.run.files import need_output_for_lists, output_file
from recipes.use.scores_file import ScoredSolution, numbered_scores, use_of


def run_select(options: SelectOptions) -> None:
    """Write a line for every question, in the order in which they begin in the scores file.

    A line holds ``group`` and ``id`` of the selected candidate, its ``score``, its ``answer`` and
    ``correct`` if known, and ``tied``: the ids of all candidates with that score. Of a candidate
    that was judged by its first steps alone it also holds ``scored_steps`` and ``steps``. A draw
    depends on the seed and on the name of the question only.

    Raises:
        OptionError: There is no such file or no such aggregation, or the output exists already or
            cannot be written.
        DataError: A line is malformed or has no ``group``, and is refused, or too many are; or the
            scores are not complete.
        OSError: The output cannot be written.
    """
    scores = Path(options.scores)
    output = output_file(
        "--output", options.output, overwrite=options.overwrite, inputs=(options.scores,)
    )
    need_output_for_lists(options, output.path)
    bad = bad_rows_of(options, scores)
    aggregation = options.aggregation or use_of(scores)[0]
    questions: dict[str, list[ScoredSolution]] = {}
    for line, row in numbered_scores(scores, bad):
        if row.group is None:
            error = DataError(
                expected="the name of the question (candidates are compared within one)",
                found="nothing",
                file=scores,
                line=line,
                field="group",
                remedy="give the candidates the field group and score them again",
            )
            bad.add(error, row.id)
        elif aggregation not in row.scores:
            there = ", ".join(row.scores) + did_you_mean(aggregation, row.scores)
            if options.on_bad_row == "refuse":
                raise OptionError(
                    f"--aggregation {aggregation}: line {line} of {scores} has {there}"
                )
            field = f"scores.{aggregation}"
            error = DataError(expected="a number", found=there, file=scores, line=line, field=field)
            bad.add(error, row.id)
        else:
            questions.setdefault(row.group, []).append(row)
    bad.check()
    if not questions:
        found = f"none in {bad.rows:,} rows" + (f"; {bad.first}" if bad.left_out else "")
        raise DataError(expected="a candidate", found=found, file=scores)
    lines = []
    several = 0
    for group, rows in questions.items():
        values = [row.scores[aggregation] for row in rows]
        winner, tied = best_candidate(values, tie=options.tie, seed=f"{options.seed} {group}")
        best = rows[winner]
        several += len(tied) > 1
        known = {"answer": best.answer, "correct": best.correct}
        record = {
            "group": group,
            "id": best.id,
            "score": values[winner],
            **{name: value for name, value in known.items() if value is not None},
            **(
                {}
                if best.steps is None
                else {"scored_steps": len(best.step_scores), "steps": best.steps}
            ),
            "tied": [rows[other].id for other in tied],
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    output.write_text("\n".join(lines) + "\n")
    report_bad_rows([bad], output.path, output.say)
    cut = sum(row.steps is not None for rows in questions.values() for row in rows)
    output.say(
        f"{len(lines)} questions, best {aggregation} of "
        f"{sum(map(len, questions.values()))} candidates; {several} ties settled by {options.tie!r}"
        + (f"; {cut} candidates are judged by their first steps alone" if cut else "")
    )
