"""``bilevel-prm score``: score every step and solution of a file; the command can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prm.aggregations import AGGREGATIONS
from prm.digests import check_digest, digest_file, digest_path, write_digest
from prm.models.model import PRM
from prm.schema import DataError, StepExample
from prm.scoring import WINDOW, aggregate
from recipes.bad_rows import report_bad_rows, skipped_path, truncated_path
from recipes.evaluation.scoring import score_rows
from recipes.models.loading import load_model, placement_of, read_examples, set_up
from recipes.options.use import ScoreOptions
from recipes.options.values import OptionError
from recipes.ranks import ranks_here
from recipes.run.files import named, output_file, write_json, write_text
from recipes.run.identity import digest_model
from recipes.run.lock import locked
from recipes.terminal import progress_bar, say
from recipes.use.scores_file import (
    USE,
    ScoredSolution,
    complete_lines,
    read_settings,
    settings_path,
)

_FORMAT = 1
_SOLUTIONS = "solutions"


def run_score(options: ScoreOptions) -> Path:
    """Score the remaining solutions, and return the scores file.

    Raises:
        OptionError: The output exists and is not a scores file of this model, data and settings,
            another process writes it, or it cannot be written.
        DataError: A record, or a line of the output, cannot be used.
        OSError: The output cannot be written; what was written so far stays.
    """
    # An existing file is gone on with, or refused by _begin.
    inputs = (options.file,)
    output_file("--output", options.output, overwrite=True, inputs=inputs, streams=False)
    output = Path(options.output)
    with locked(output):
        _score(options, output)
    return output


def _score(options: ScoreOptions, output: Path) -> None:
    set_up(options)
    prm, params = load_model(options, placement=placement_of(options.placement))
    data = read_examples(prm, options, options.file)
    settings = settings_of(prm, options) | {_SOLUTIONS: len(data)}
    ids = (example.id for example in data.facts)
    total = {(row.line, row.id): row.steps for row in data.bad.truncated}
    done = _begin(output, settings, ids, Path(options.file), overwrite=options.overwrite)
    report_bad_rows([data.bad], output, say)
    started = time.perf_counter()
    window = WINDOW * options.eval_batch_size
    done = ranks_here().numbers(done)[0]  # the others write a copy that nobody reads
    # An incomplete window is scored again as a whole, so that its batches are the same.
    first = done // window * window if done < len(data) else len(data)
    with (
        named(output),
        output.open("a", encoding="utf-8", newline="\n") as file,
        progress_bar("scoring", len(data), first) as bar,
    ):
        for start in range(first, len(data), window):
            encoded = data.encoded[start : start + window]
            scores = score_rows(
                prm,
                params,
                encoded,
                data.collator,
                options.eval_batch_size,
                bar,
                full_vocab=prm.usage.probability == "vocabulary",
                workers=options.workers,
                tokens_per_batch=options.tokens_per_batch,
            )
            lines = data.lines[start : start + window]
            for number, (row, line, steps) in enumerate(
                zip(encoded, lines, scores, strict=True), start=start
            ):
                if not steps.isfinite().all():
                    raise DataError(
                        expected="numbers as step scores",
                        found=f"{steps.tolist()}",
                        file=options.file,
                        example=row.example.id,
                        remedy="the model's parameters are not finite, or overflow in use",
                    )
                if number >= done:
                    known = total.get((line, row.example.id))
                    file.write(scored_solution(row.example, steps, known).line())
            file.flush()
            os.fsync(file.fileno())
    write_digest(output)
    seconds = time.perf_counter() - started
    say(
        f"{output}: {len(data) - done} solutions scored in {seconds:.1f} s"
        + (f", {done} were there" if done else "")
    )


def scored_solution(
    example: StepExample, step_scores: Tensor, steps: int | None = None
) -> ScoredSolution:
    """Return the line of an example with step scores [steps], of ``steps`` if it was cut."""
    return ScoredSolution(
        id=example.id,
        step_scores=tuple(step_scores.tolist()),
        scores=all_aggregates(step_scores),
        group=example.group,
        answer=example.answer,
        correct=example.correct,
        steps=steps,
    )


def all_aggregates(step_scores: Tensor) -> dict[str, float]:
    """Return the score of a solution with step scores [steps], by every aggregation."""
    mask = torch.ones(step_scores.shape, dtype=torch.bool)
    return {name: float(aggregate(step_scores, mask, how)) for name, how in AGGREGATIONS.items()}


def settings_of(prm: PRM, options: ScoreOptions) -> dict[str, Any]:
    """Return what determines the scores: model, preprocessing, data, prompt, and the arithmetic.

    Batch size and threads change the last bits only and are left out. The content of the images is
    not read; the data name them by path. ``use`` is how the model's scores are used, which changes
    none of them.
    """
    usage = prm.usage
    return {
        "format": _FORMAT,
        "model": {"path": options.model, "sha256": digest_judge(prm)},
        "file": {"path": options.file, "sha256": digest_file(options.file)},
        "system_prompt": usage.system_prompt,
        "context": usage.context,
        "max_patches": usage.max_patches,
        "probability": usage.probability,
        **({} if options.too_long == "refuse" else {"too_long": options.too_long}),
        "precision": placement_of(options.placement).precision,
        USE: {"aggregation": usage.aggregation, "threshold": usage.threshold},
    }


def digest_judge(prm: PRM) -> str:
    """Return the SHA-256 of the parameters and of how text and images are prepared."""
    processor = prm.image_processor
    parts = [
        digest_model(prm.model),
        prm.tokenizer.backend_tokenizer.to_str(),
        str(prm.tokenizer.chat_template),
        "" if processor is None else json.dumps(processor.to_dict(), sort_keys=True, default=str),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _begin(
    output: Path, settings: Mapping[str, Any], ids: Iterable[str], data: Path, *, overwrite: bool
) -> int:
    """Prepare the output for more lines, and return how many solutions it holds."""
    if overwrite or not output.exists():
        lists = (skipped_path(output), truncated_path(output))
        for there in (settings_path(output), digest_path(output), *lists):
            if there.exists() and not overwrite:
                raise OptionError(
                    f"--output {output}: {there.name} exists already, without scores; nothing was "
                    "overwritten. Remove it, give another name, or give --overwrite"
                )
        digest_path(output).unlink(missing_ok=True)
        write_text(output, "")
        write_json(settings_path(output), settings)
        return 0
    earlier = read_settings(output)
    if not earlier:
        raise OptionError(
            f"--output {output}: exists, without {settings_path(output).name} beside it that says "
            "what it is; choose another file, or give --overwrite"
        )
    earlier = {"precision": "float32", **earlier}  # scores of version 0.1 do not say it
    differ = [
        name
        for name in dict.fromkeys((*settings, "too_long"))
        if name not in (_SOLUTIONS, USE) and _decisive(settings, name) != _decisive(earlier, name)
    ]
    if differ:
        values = "; ".join(f"{name}: {_shown(earlier, name)}" for name in differ)
        raise OptionError(
            f"--output {output}: holds scores made with other settings ({values}); nothing was "
            "changed. Choose another file, or begin it anew with --overwrite"
        )
    check_digest(output)
    done = complete_lines(output, ids, data)
    if _SOLUTIONS not in earlier:  # of a version that did not store their number
        write_json(settings_path(output), {**earlier, _SOLUTIONS: settings[_SOLUTIONS]})
    return done


def _decisive(settings: Mapping[str, Any], name: str) -> Any:
    value = settings.get(name)
    return value.get("sha256") if isinstance(value, dict) else value


def _shown(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name)
    if isinstance(value, dict):
        return f"{value.get('path')} of other content"
    return repr(value)
