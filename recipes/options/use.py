"""Options of the commands around training: score, select, evaluate, weigh, relabel and others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from prm.names import DrawRule, Probability, TieRule
from recipes.options.base import (
    MOST_EXAMPLES,
    MOST_NUMBER,
    MOST_SEED,
    Condition,
    LoaderOptions,
    ReadOptions,
    ScoringOptions,
    option,
    tokens_per_batch,
)

_PROBABILITY = (
    "softmax that a step's score is read from, over the two labels or, as in DreamPRM-1.5, over "
    "the whole vocabulary (default: as the model was trained, or else labels)"
)


_PROMPT = ("system_prompt", "context", "max_patches")
_LENGTH = ("too_long",)
_PLACEMENT = ("device", "precision", "attention")


def _scores_itself(given: Any) -> bool:
    """Return whether ``evaluate`` has to score a file."""
    return given.scores is None or (given.dev is not None and given.dev_scores is None)


DEV_NAMED = Condition(
    lambda given: given.dev is not None,
    text="{flags} has no effect without --dev: name the candidates too",
)
OUTPUT_NAMED = Condition(
    lambda given: given.output is not None, text="{flags} has no effect without --output"
)
CHOSEN_BY_HAND = Condition(
    lambda given: given.dev is None,
    text="{flags}: no effect with --dev, which chooses: leave out one",
)
MODEL_ASKED = Condition(
    _scores_itself, text="{flags}: no effect with --scores: nothing is scored. Leave out one"
)


def _by(*kinds: str, shown: str | None = None) -> Condition:
    """Return the condition that ``weigh`` uses one of the ``kinds``."""
    return Condition(
        lambda given: given.by in kinds,
        shown=shown,
        text="{flags}: no effect with --by {by}; leave out",
    )


BY_WEIGHTING = _by("weighting", shown="by weighting")
BY_A_RULE = _by("bis", "small-loss", "random")
BY_BIS = _by("bis", shown="bis")
BY_MODEL = _by("weighting", "small-loss")
BY_REFERENCE = _by("weighting")
BY_SEED = _by("weighting", "small-loss", "random")
BY_LEARNED = _by("learned", shown="learned")
BY_NAIT = _by("nait", shown="nait")
BY_SCAN = _by("scan", shown="scan")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(LoaderOptions):
    """Score every step of every candidate of a file, and write the scores during the run."""

    HIDES_LABELS: ClassVar[bool] = True

    file: str = option(..., "JSONL of solutions")
    output: str = option(
        ...,
        "scores.jsonl to write; if it holds scores of the same model, file and settings already, "
        "go on behind them",
    )
    overwrite: bool = option(False, "begin an existing --output anew")
    probability: Probability | None = option(None, _PROBABILITY)
    eval_batch_size: int = option(
        64, "most solutions per forward pass", least=1, most=MOST_EXAMPLES
    )
    tokens_per_batch: int = tokens_per_batch()


@dataclass(frozen=True, kw_only=True)
class SelectOptions(ReadOptions):
    """Select the best candidate of every question."""

    scores: str = option(..., "scores.jsonl of `score`")
    output: str = option(..., "JSONL to write, one line a question; -: to standard output")
    overwrite: bool = option(False, "replace an existing --output")
    aggregation: str | None = option(
        None,
        "which of the scores of a line decides (default: the model's, as beside the scores, or "
        "else mean)",
    )
    tie: DrawRule = option("random", "which of several best candidates is taken")
    seed: int = option(0, "fixes the draw among tied candidates", least=0, most=MOST_SEED)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ScoringOptions):
    """Score a file of candidates with a model and select the best of each question."""

    HIDES_LABELS: ClassVar[bool] = True
    ONLY_WITH: ClassVar[Mapping[Condition, tuple[str, ...]]] = {
        CHOSEN_BY_HAND: ("aggregation",),
        MODEL_ASKED: (
            *("model", *_PROMPT, *_PLACEMENT, "eval_batch_size", "tokens_per_batch", "workers"),
        ),
    }

    file: str = option(
        ...,
        "JSONL of candidates with `group`, `correct` and, for votes, `answer`; or of solutions "
        "with step labels, such as ProcessBench",
    )
    output: str | None = option(
        None,
        "write the figures to this JSON file; -: to standard output, the table to standard error",
    )
    overwrite: bool = option(False, "replace an existing --output", only_with=OUTPUT_NAMED)
    scores: str | None = option(
        None, "scores.jsonl of `score` for --file: read, no model is loaded for it"
    )
    dev: str | None = option(
        None, "candidates on which aggregation and threshold are chosen before --file is looked at"
    )
    dev_scores: str | None = option(None, "scores.jsonl of `score` for --dev", only_with=DEV_NAMED)
    baseline_scores: str | None = option(
        None, "scores.jsonl of another model for --file, to compare with"
    )
    threshold: float | None = option(
        None,
        "a step whose score exceeds it is judged right (default: the model's, or else 0.5)",
        least=0,
        most=1,
        only_with=CHOSEN_BY_HAND,
    )
    tie: TieRule = option(
        "expected", "value of tied candidates: on average over a fair draw, the first's, the last's"
    )
    equal_answers: Literal["text", "math-verify"] = option(
        "text",
        "which answers vote together: those of one form as text; or also those that math-verify "
        "shows to be equal by algebra (needs the extra `math`)",
    )
    probability: Probability | None = option(None, _PROBABILITY, only_with=MODEL_ASKED)
    meta_file: str | None = option(
        None,
        "meta set that the model's training weights were learned on, which --file must not share "
        "questions with (default: the one in the args.yaml of the model's run)",
    )
    sanity_check: bool = option(
        False, "allow --file to be the meta or dev set: an upper bound, labelled as such"
    )


@dataclass(frozen=True, kw_only=True)
class WeighOptions(LoaderOptions):
    """Weigh the examples of a file by a saved weighting or by a rule."""

    ONLY_WITH: ClassVar[Mapping[Condition, tuple[str, ...]]] = {
        BY_MODEL: ("model", *_PROMPT, *_LENGTH, *_PLACEMENT, "workers"),
        BY_SEED: ("seed",),
    }
    ASKS_MODEL: ClassVar[tuple[str, ...]] = (
        *("model", "reference_model", *_PROMPT, *_LENGTH, *_PLACEMENT),
        *("eval_batch_size", "tokens_per_batch", "workers"),
    )
    """Options that only a weighting that needs the model reads."""

    by: Literal["weighting", "bis", "small-loss", "random"] = option(
        "weighting",
        "what weighs: a learned --weighting; or a rule that keeps a share of the examples: those "
        "of highest Balanced-Information Score (arXiv 2602.04145), of smallest loss under --model, "
        "or drawn at random",
    )
    weighting: str | None = option(None, "weighting directory of a run", only_with=BY_WEIGHTING)
    keep: float = option(
        0.25, "share of the examples that a rule keeps", least=0, most=1, only_with=BY_A_RULE
    )
    within: Literal["file", "domain"] = option(
        "file", "what the share is of; bis was published with domain", only_with=BY_A_RULE
    )
    alpha: float = option(
        0.05,
        "what examples whose labels are all alike still count",
        least=0,
        most=MOST_NUMBER,
        only_with=BY_BIS,
    )
    file: str = option(..., "JSONL; with step labels for an Instance Net and for rules")
    output: str = option(..., "weights.jsonl to write; -: to standard output")
    overwrite: bool = option(False, "replace an existing --output")
    reference_model: str | None = option(
        None,
        "model that the run started from, for an Instance Net with reference features (default: "
        "that of the run's args.yaml)",
        only_with=BY_REFERENCE,
    )
    eval_batch_size: int = option(
        64, "most solutions per forward pass", least=1, most=MOST_EXAMPLES, only_with=BY_MODEL
    )
    tokens_per_batch: int = tokens_per_batch(only_with=BY_MODEL)


@dataclass(frozen=True, kw_only=True)
class RelabelOptions(LoaderOptions):
    """Write a file with corrected step labels: learned ones of a run, or those of a rule."""

    ONLY_WITH: ClassVar[Mapping[Condition, tuple[str, ...]]] = {
        BY_NAIT: ("model", *_PROMPT, *_LENGTH, *_PLACEMENT, "workers", "seed"),
    }

    by: Literal["learned", "nait", "scan"] = option(
        "learned",
        "what corrects: --labels of a run; or a rule: the scores of --model where they are far "
        "from a label (NAIT, arXiv 2601.12748), or labels of rollouts made soft before the first "
        "failure (SCAN, arXiv 2509.16548)",
    )
    labels: str | None = option(
        None, "labels.jsonl of a run with --weighting labels on this file", only_with=BY_LEARNED
    )
    threshold: float = option(
        0.25,
        "distance of score and label above which the score takes its place",
        least=0,
        most=1,
        only_with=BY_NAIT,
    )
    confidence: str = option(
        "self_confidence",
        "field of a row with the share of the sampling model's solutions that are right",
        only_with=BY_SCAN,
    )
    least_confidence: float = option(
        0.75,
        "rows of a lower confidence are left out",
        least=0,
        most=1,
        only_with=BY_SCAN,
    )
    tolerance: int = option(
        2,
        "steps before the first failure whose labels become soft",
        least=0,
        most=MOST_EXAMPLES,
        only_with=BY_SCAN,
    )
    file: str = option(..., "JSONL with step labels; for SCAN shares of completions")
    output: str = option(..., "JSONL to write, in the project's format")
    overwrite: bool = option(False, "replace an existing --output")
    eval_batch_size: int = option(
        64, "most solutions per forward pass", least=1, most=MOST_EXAMPLES, only_with=BY_NAIT
    )
    tokens_per_batch: int = tokens_per_batch(only_with=BY_NAIT)


@dataclass(frozen=True, kw_only=True)
class ConvertModelOptions:
    """Rewrite an InternVL checkpoint that needs code of its own, without running that code."""

    input: str = option(
        ...,
        "folder of an InternVL checkpoint in its original layout (InternVL2.5, InternVL3, "
        "VisualPRM, DreamPRM-1.5), downloaded",
    )
    output: str = option(..., "folder to write; takes the place of a model everywhere")


@dataclass(frozen=True, kw_only=True)
class PushFlags:
    """Upload model, weighting and card of a complete run to the Hugging Face Hub."""

    repo: str = option(..., "repository on the Hub, org/name; created if it does not exist")
    private: bool = option(False, "create it as a private one")
    revision: str | None = option(
        None, "branch to commit to, created if it does not exist (default: main)"
    )
    dry_run: bool = option(False, "say what would be uploaded, and end")


@dataclass(frozen=True, kw_only=True)
class PushOptions(PushFlags):
    """``PushFlags`` and the run."""

    directory: str = option(..., "run directory")


@dataclass(frozen=True, kw_only=True)
class EnvOptions:
    """Print versions, devices and the commit for a bug report."""
