"""Options of the two kinds of runs: a cold start, and training with instance weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from prm.names import AggregationName, LossTarget, Probability, Recomputed
from recipes.options import conditions
from recipes.options.base import (
    MOST_ROWS,
    Condition,
    LoaderOptions,
    ScoringOptions,
    group,
    option,
    variants,
)
from recipes.options.choices import (
    DomainOptions,
    HypergradientOptions,
    ImplicitOptions,
    LabelsOptions,
    NetOptions,
    NoWeighting,
    OneStepOptions,
    PenaltyOptions,
    TableOptions,
    UnrolledOptions,
    WeightingOptions,
)
from recipes.options.groups import (
    FrozenSettings,
    LoraSettings,
    LowerLevel,
    RunSettings,
    TrustedData,
    UpperLevel,
)


@dataclass(frozen=True, kw_only=True)
class LowerOptions(LoaderOptions):
    """Options of every run, for the training of the process reward model itself."""

    TRAINS: ClassVar[bool] = True

    train_file: str = option(..., "JSONL with step labels", on_resume="file")
    output_dir: str = option(..., "run directory; must not hold a run yet", on_resume="free")
    on_existing: Literal["refuse", "number"] = option(
        "refuse",
        "when it holds a run: refuse, or append the next free number to its name",
        on_resume="free",
    )
    lower: LowerLevel = group(LowerLevel, "lower level")
    lora: LoraSettings = group(LoraSettings, "low-rank adapters")
    activation_checkpointing: Recomputed = option(
        "none",
        "layers that are computed again in the backward pass instead of being stored: those of the "
        "vision tower, or all; the same bits, less memory, more time",
        on_resume="free",
    )
    sharding: Literal["none", "full"] = option(
        "none",
        "full: each process that torchrun starts holds a part of the parameters, gradient and "
        "moments (FSDP2, FULL_SHARD), for models that do not fit; none: all of them",
    )
    frozen: FrozenSettings = group(FrozenSettings, "frozen parts")
    probability: Probability = option(
        "labels",
        "softmax of the losses of both levels and of scores, over the two labels or, as in "
        "DreamPRM-1.5, over the whole vocabulary",
    )
    run: RunSettings = group(RunSettings, "the run")


@dataclass(frozen=True, kw_only=True)
class ColdStartOptions(LowerOptions):
    """A short supervised pass over a random draw of the training file, with all weights 1."""

    draw: int = option(
        300, "examples drawn from the training file; 0: all", least=0, most=MOST_ROWS
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LowerOptions, ScoringOptions):
    """Bilevel training with instance weights, followed by an evaluation."""

    ONLY_WITH: ClassVar[Mapping[Condition, tuple[str, ...]]] = {
        conditions.ON_TRAIN_FILE: ("lower_loss",),
        conditions.AGGREGATED: ("aggregation",),
        conditions.SCORED: ("eval_batch_size", "tokens_per_batch"),
        conditions.FROM_MODEL: ("model",),
    }

    aggregation: AggregationName = option(
        "mean", "how the step scores of a solution become its score"
    )
    init_from: str | None = option(
        None, "model directory of a cold start; default: start from --model", on_resume="path"
    )
    initial_loss: bool = option(
        True,
        "write the loss of every training example under the initial model to weights.jsonl, for "
        "which the training set is scored once; after training, unless features read the scores",
        only_with=conditions.WEIGHTED,
        on_resume="free",
    )
    data: TrustedData = group(TrustedData, "trusted data and evaluation")
    weighting: WeightingOptions = variants(
        "net",
        "Instance Net, Instance Table, Domain Table, learned labels, or none: all weights 1 (No "
        "Selection)",
        {
            "net": NetOptions,
            "table": TableOptions,
            "domain": DomainOptions,
            "labels": LabelsOptions,
            "none": NoWeighting,
        },
        listed=("none", "domain", "table", "labels", "net"),
    )
    upper: UpperLevel = group(UpperLevel, "upper level", only_with=conditions.WEIGHTED)
    loss_target: Literal[LossTarget, "pairs"] = option(
        "both",
        "meta loss: squared distance from right (both, +: as in DreamPRM-1.5), or of the "
        "difference of right and wrong candidates of a question from 1 (pairs)",
        only_with=conditions.META_LOSS,
    )
    hypergradient: HypergradientOptions = variants(
        "one-step",
        "through the last lower step of a window, through all of its --unroll-steps, at its end as "
        "if the lower level were solved, or by a penalty on a second copy of the model",
        {
            "one-step": OneStepOptions,
            "unrolled": UnrolledOptions,
            "implicit": ImplicitOptions,
            "penalty": PenaltyOptions,
        },
        only_with=conditions.WEIGHTED,
    )
    rollback: bool = option(
        False,
        "redo the lower step (all of a window but with one-step) with the updated weights",
        only_with=conditions.WEIGHTED,
    )
