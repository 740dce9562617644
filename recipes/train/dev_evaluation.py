"""Evaluation on the development set during training, and the parameters of its best step.

``--eval-every N`` scores the candidates of ``--dev-file`` before the first step, where a multiple
of N steps is passed, and after the last. Each time is a line of ``log.jsonl``, of the phase "dev":

    {"phase": "dev", "step": 120, "best_of_n": 0.7125, "step_auc": 0.83, "step_macro_f1": 0.71}

It draws no random number of the run's, so that the steps are those of a run without it.

``--keep-best`` is model selection, or early stopping after the fact: the run ends with both levels
as they were after the step of the highest best-of-N accuracy, the earliest of several. A kept step
is ``best/step-<n>.safetensors`` with the trained parameters θ and φ. Those that may still be asked
for stay: the best of all evaluations, and the best up to each checkpoint, from which the run may go
on. A step that is kept is on the disk before its score is in a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from bilevel import tree
from bilevel.autodiff.random_state import rewound_to
from bilevel.profiling import part
from prm.digests import check_digest, digest_file, digest_path, write_digest
from prm.files import atomic_write
from prm.models.model import PRM
from recipes.evaluation.candidates import Candidates, Evaluation, evaluate
from recipes.method.objective import State
from recipes.options.train import TrainOptions
from recipes.options.values import OptionError
from recipes.run.checkpoints import DevScore, Progress
from recipes.run.files import remove_directory
from recipes.run.resume import Run
from recipes.run.step_log import append_line, json_line
from recipes.tensor_file import write_tensors

PHASE = "dev"
"""The phase of the lines of an evaluation in the log."""
BEST = "best"
"""Name of the folder of kept steps in the run directory."""


@dataclass(frozen=True)
class DevEvaluation:
    """When the dev set of a run is scored, how, and what is kept.

    Attributes:
        every: The number of lower steps between evaluations.
        steps: The number of lower steps of the run.
        keeps_best: Whether the parameters of the best step are kept.
        file: The path of the dev set.
        digest: The SHA-256 of its content.
        title: The name of the run, for messages.
        shown: Whether each evaluation is told.
        evaluated: The evaluation of trained parameters θ.
    """

    every: int
    steps: int
    keeps_best: bool
    file: str
    digest: str
    title: str
    shown: bool
    evaluated: Callable[[Mapping[str, Tensor]], Evaluation]

    def due(self, steps: int, scores: Sequence[DevScore]) -> bool:
        """Return whether an evaluation is due after so many lower steps.

        Args:
            steps: The lower steps so far.
            scores: The evaluations so far.
        """
        last = scores[-1].step if scores else -1
        return steps > last and (steps >= self.steps or steps // self.every > last // self.every)

    def check(self, run: Run) -> None:
        """Refuse to go on with scores that are not of this dev set, or whose best step is gone.

        Raises:
            OptionError: They are not, or it is.
        """
        scores = run.start.dev
        for score in scores:
            if score.file != self.digest:
                raise OptionError(
                    f"--dev-file {self.file}: its content is another than when it was scored after "
                    f"step {score.step}; give that file to go on, or --eval-every 0 --no-keep-best"
                )
        if self.keeps_best and scores and run.writes:
            step = best_of(scores).step
            if not _path(run.directory, step).is_file():
                raise OptionError(
                    f"--keep-best: {_path(run.directory, step)} is not there, the parameters of "
                    "the best step so far; give --no-keep-best to go on without them"
                )

    @part("dev evaluation")
    def taken(self, run: Run, progress: Progress, seconds_left: float | None = None) -> Progress:
        """Score the dev set, log it, keep the parameters if none were better, and return the run.

        All ranks call this after the same step.

        Args:
            run: The run.
            progress: Its state.
            seconds_left: How long the rest of the run will take, None if that is not known.

        Raises:
            WriteError: The log cannot be written.
            OSError: The parameters cannot be written, or an image cannot be read.
            bilevel.RankError: Another rank fails or is gone.
        """
        state = progress.state
        with rewound_to(progress.random, state.lower_params):
            found = self.evaluated(state.lower_params)
        step = int(state.lower_steps)
        score = DevScore(step, float(found.selected.mean()), self.digest)
        scores = (*progress.dev, score)
        if run.writes:
            if self.keeps_best:
                if best_of(scores) is score:
                    _write(_path(run.directory, step), state)
                _remove_others(run, scores)
            figures = {"best_of_n": score.best_of_n, "step_auc": found.step_auc}
            figures["step_macro_f1"] = found.step_macro_f1
            append_line(run.log, json_line({"phase": PHASE, "step": step, **figures}))
        if self.shown:
            tqdm.write(self._told(scores, seconds_left), file=sys.stderr)
        return replace(progress, dev=scores)

    def chosen(self, run: Run, state: State, scores: Sequence[DevScore]) -> State:
        """Return the last state with θ and φ of the best step, on all ranks, in new tensors.

        Raises:
            DataError: The file of the step is not as it was written.
        """
        params = {"lower": state.lower_params, "upper": state.upper_params}
        if run.writes:
            path = _path(run.directory, best_of(scores).step)
            check_digest(path)
            there = tree.unflatten(load_file(path), params)
            params = tree.map(lambda like, leaf: torch.empty_like(like).copy_(leaf), params, there)
        params = run.ranks.first(params)
        return state._replace(lower_params=params["lower"], upper_params=params["upper"])

    def _told(self, scores: Sequence[DevScore], seconds_left: float | None) -> str:
        score, best = scores[-1], best_of(scores)
        text = f"{self.title}, step {score.step} of {self.steps}: dev best-of-N "
        text += f"{score.best_of_n:.4f}"
        if best is not score:
            text += f" (best so far {best.best_of_n:.4f}, step {best.step})"
        if seconds_left is not None:
            text += f", {tqdm.format_interval(seconds_left)} left"
        return text


def dev_evaluation(
    options: TrainOptions, prm: PRM, evaluations: Mapping[str, Candidates], title: str
) -> DevEvaluation | None:
    """Return the evaluation that a run asks for, None if it asks for none.

    Args:
        options: The options of the run.
        prm: Its model.
        evaluations: The files of candidates by name.
        title: The name of the run.

    Raises:
        OptionError: ``--keep-best`` has nothing to choose by.
    """
    if not options.data.eval_every:
        return None
    file, candidates = str(options.data.dev_file), evaluations["dev"]
    if options.data.keep_best and not candidates.mixed:
        raise OptionError(
            f"--keep-best: of {len(candidates.groups):,} questions of --dev-file {file} none has "
            "right and wrong candidates, so that all steps have one best-of-N accuracy; give "
            "candidates to choose from, or leave --keep-best out"
        )
    return DevEvaluation(
        options.data.eval_every,
        options.lower.steps,
        options.data.keep_best,
        file,
        digest_file(file),
        title,
        options.run.progress,
        lambda params: evaluate(prm, params, candidates, options),
    )


def best_of(scores: Sequence[DevScore]) -> DevScore:
    """Return the highest best-of-N accuracy, the earliest of several."""
    return max(scores, key=lambda score: (score.best_of_n, -score.step))


def selection(scores: Sequence[DevScore], kept: DevScore) -> dict[str, Any]:
    """Return the entry of ``results.json`` on which step the model is of.

    Args:
        scores: All evaluations.
        kept: That of the step whose model is kept.
    """
    best, last = best_of(scores), scores[-1]
    return {
        "step": kept.step,
        "best": {"step": best.step, "best_of_n": best.best_of_n},
        "last": {"step": last.step, "best_of_n": last.best_of_n},
    }


def remove_kept(directory: Path) -> None:
    """Remove the kept steps of a run that is complete."""
    remove_directory(directory / BEST)


def _path(directory: Path, step: int) -> Path:
    return directory / BEST / f"step-{step}.safetensors"


def _write(path: Path, state: State) -> None:
    """Write θ and φ. A digest that is older than its file belongs to a step that comes again."""
    digest_path(path).unlink(missing_ok=True)
    with atomic_write(path) as unfinished:
        write_tensors(
            unfinished, tree.flatten({"lower": state.lower_params, "upper": state.upper_params})
        )
    write_digest(path)


def _remove_others(run: Run, scores: Sequence[DevScore]) -> None:
    """Remove what neither this run nor one that goes on from a checkpoint will ask for."""
    ends = [*run.checkpoints.steps(), scores[-1].step]
    parts = [[score for score in scores if score.step <= end] for end in ends]
    stays = {_path(run.directory, best_of(part).step) for part in parts if part}
    for path in (run.directory / BEST).glob("step-*.safetensors"):
        if path not in stays:
            path.unlink()
            digest_path(path).unlink(missing_ok=True)
