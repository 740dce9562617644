"""``bilevel-prm select``: select the best candidate of every question from a scores file."""

from __future__ import annotations

import json
from pathlib import Path

from prm.evaluation.select import best_candidate
from prm.schema import DataError
from recipes.options.use import SelectOptions
from recipes.options.values import OptionError, did_you_mean
from recipes.run.files import output_file
from recipes.use.scores_file import ScoredSolution, read_scores


def run_select(options: SelectOptions) -> None:
    """Write a line for every question, in the order in which they begin in the scores file.

    A line holds ``group`` and ``id`` of the selected candidate, its ``score``, its ``answer`` and
    ``correct`` if known, and ``tied``: the ids of all candidates with that score. Of a candidate
    that was judged by its first steps alone it also holds ``scored_steps`` and ``steps``. A draw
    depends on the seed and on the name of the question only.

    Raises:
        OptionError: There is no such file or no such aggregation, or the output exists already or
            cannot be written.
        DataError: A line is malformed or has no ``group``, or the scores are not complete.
        OSError: The output cannot be written.
    """
    scores = Path(options.scores)
    output = output_file(
        "--output", options.output, overwrite=options.overwrite, inputs=(options.scores,)
    )
    questions: dict[str, list[ScoredSolution]] = {}
    for line, row in enumerate(read_scores(scores), start=1):
        if row.group is None:
            raise DataError(
                expected="the name of the question (candidates are compared within one)",
                found="nothing",
                file=scores,
                line=line,
                field="group",
                remedy="give the candidates the field group and score them again",
            )
        if options.aggregation not in row.scores:
            raise OptionError(
                f"--aggregation {options.aggregation}: line {line} of {scores} has "
                f"{', '.join(row.scores)}" + did_you_mean(options.aggregation, row.scores)
            )
        questions.setdefault(row.group, []).append(row)
    lines = []
    several = 0
    for group, rows in questions.items():
        values = [row.scores[options.aggregation] for row in rows]
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
    cut = sum(row.steps is not None for rows in questions.values() for row in rows)
    output.say(
        f"{len(lines)} questions, best {options.aggregation} of "
        f"{sum(map(len, questions.values()))} candidates; {several} ties settled by {options.tie!r}"
        + (f"; {cut} candidates are judged by their first steps alone" if cut else "")
    )
