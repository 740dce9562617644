"""Groups of options that every training run has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from recipes.options.base import MOST_EXAMPLES, MOST_NUMBER, MOST_STEPS, option
from recipes.options.conditions import (
    CACHED,
    DEV_NAMED,
    EVALUATED,
    KEPT,
    LORA,
    LOWER_COSINE,
    LOWER_STEP,
    META_LOSS,
    SAVED,
    TEST_NAMED,
    TUNED_AND_TEST,
    UPPER_ADAM,
    UPPER_COSINE,
    UPPER_STEP,
)

Tracker: TypeAlias = Literal["tensorboard", "trackio", "wandb"]


@dataclass(frozen=True, kw_only=True)
class LowerLevel:
    """Options of the lower level: which parameters are trained, and how."""

    freeze: tuple[str, ...] = option(
        (), "name prefixes of modules that are not trained, for example vision_tower"
    )
    steps: int = option(300, "lower-level optimizer steps", least=0, most=MOST_STEPS)
    batch_size: int = option(32, "examples per micro-batch", least=1, most=MOST_EXAMPLES)
    accumulation: int = option(1, "micro-batches per lower step", least=1, most=MOST_EXAMPLES)
    lr: float = option(
        5e-4, "peak learning rate of AdamW", name="lower_lr", least=0, most=MOST_NUMBER
    )
    betas: tuple[float, float] = option(
        (0.9, 0.98), "decay rates of Adam's moments", name="lower_betas", least=0, most=1
    )
    weight_decay: float = option(
        0.01, "decoupled weight decay", name="lower_weight_decay", least=0, most=MOST_NUMBER
    )
    warmup: float = option(
        0.05,
        "share of the steps with linear warm-up",
        name="lower_warmup",
        least=0,
        most=1,
        only_with=LOWER_COSINE,
    )
    schedule: Literal["cosine", "step", "constant"] = option(
        "cosine",
        "cosine: warm-up, then down to 0; step: times --lower-gamma every --lower-step-size "
        "steps; constant: the peak at every step",
        name="lower_schedule",
    )
    step_size: int = option(
        1000,
        "steps between drops of the learning rate",
        name="lower_step_size",
        least=1,
        most=MOST_STEPS,
        only_with=LOWER_STEP,
    )
    gamma: float = option(
        0.95, "factor of each drop", name="lower_gamma", least=0, most=1, only_with=LOWER_STEP
    )
    max_norm: float | None = option(
        1.0,
        "global-norm clip of the gradient; null: none",
        name="lower_max_norm",
        least=0,
        most=MOST_NUMBER,
    )
    execution: Literal["auto", "functional", "resident"] = option(
        "auto",
        "functional: a step makes new parameters beside the old; resident: parameters and moments "
        "change in place, in about a third of the memory and otherwise rounded; auto: resident "
        "from 100 million trained parameters on, where the other options allow it",
        on_resume="free",
    )
    loss: Literal["cross-entropy", "squared"] = option(
        "cross-entropy",
        "loss of a step: squared is the distance from soft labels of DreamPRM 1.0",
        name="lower_loss",
    )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Options of low-rank adapters, which are then trained instead of the model's parameters."""

    rank: int = option(
        0,
        "rank of low-rank adapters (LoRA) beside the linear layers that are not in --freeze; they "
        "alone are trained; 0: none",
        name="lora_rank",
        least=0,
        most=65_536,
    )
    alpha: float | None = option(
        None,
        "scale of the adapters, which is divided by the rank; null: twice the rank",
        name="lora_alpha",
        least=0,
        most=MOST_NUMBER,
        only_with=LORA,
    )
    targets: tuple[str, ...] = option(
        (),
        "last names of the layers that get an adapter, for example q_proj v_proj; none: every "
        "linear layer except the head",
        name="lora_targets",
        only_with=LORA,
    )
    save: Literal["adapter", "merged", "both"] = option(
        "both",
        "what is written: adapter/, which peft loads beside the first model; model/, the whole "
        "model with the adapters merged; or both",
        name="lora_save",
        only_with=LORA,
        on_resume="free",
    )


@dataclass(frozen=True, kw_only=True)
class FrozenSettings:
    """Options of what is kept of the frozen front of the model (``prm.activations``)."""

    keep: Literal["none", "memory", "disk"] = option(
        "none",
        "keep what all that stands before the first trained parameter computes (a frozen vision "
        "tower; frozen embeddings and first layers), so that each example is computed once: in "
        "memory, or on disk; each example is then computed alone, which rounds otherwise than in a "
        "padded batch",
        name="frozen_activations",
    )
    limit: float = option(
        2.0,
        "most gigabytes that are kept for each level, and for what is scored; the rest is computed "
        "each time",
        name="frozen_activations_limit",
        least=0,
        most=MOST_NUMBER,
        only_with=KEPT,
        on_resume="free",
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Options of the run itself: what it logs and saves, and how it resumes."""

    log_every: int = option(
        10, "steps between lines of log.jsonl", least=1, most=MOST_STEPS, on_resume="free"
    )
    save_every: int = option(
        0,
        "lower steps between checkpoints; 0: none",
        least=0,
        most=MOST_STEPS,
        on_resume="free",
    )
    keep_checkpoints: int = option(
        2,
        "how many of the newest checkpoints to keep; 0: all",
        least=0,
        most=MOST_STEPS,
        only_with=SAVED,
        on_resume="free",
    )
    resume: str | None = option(
        None,
        "directory of an interrupted run: go on from its newest checkpoint, with the options of "
        "its args.yaml; or one of its checkpoints, RUN/checkpoints/step-N",
        on_resume="free",
    )
    on_trouble: Literal["raise", "skip", "rollback"] = option(
        "raise",
        "what a loss, gradient, hypergradient, weight or parameter that is not finite, or an "
        "exploding hypergradient, leads to: end the run before that step, leave the step out, or "
        "return to the last checkpoint of --save-every and go on with the data",
        on_resume="free",
    )
    cache_dir: str | None = option(
        None,
        "folder for what other runs can read instead of computing it again: activations kept on "
        "disk, and scores of the training set under the initial model; null: cache/ in the run "
        "directory",
        only_with=CACHED,
        on_resume="free",
        path=True,
    )
    progress: bool = option(True, "show a progress bar", on_resume="free")
    report_to: tuple[Tracker, ...] = option(
        (),
        "trackers that get what log.jsonl says, and histograms of the weights; each is an extra",
        on_resume="free",
    )
    profile: int = option(
        0,
        "steps, behind the first, whose seconds and bytes are written to profile/, part by part "
        "and as a trace for Chrome; 0: none",
        least=0,
        most=1000,
        on_resume="free",
    )


@dataclass(frozen=True, kw_only=True)
class TrustedData:
    """Data with trusted outcomes, for the upper level and the evaluation."""

    meta_file: str | None = option(
        None,
        "JSONL with `correct`: solutions that trusted the answer",
        only_with=META_LOSS,
        on_resume="file",
    )
    dev_file: str | None = option(
        None, "candidates that may be looked at while tuning", on_resume="free", path=True
    )
    eval_every: int = option(
        0,
        "lower steps between evaluations on --dev-file during training, each a line of log.jsonl; "
        "also before the first step and after the last; 0: at the end alone",
        least=0,
        most=MOST_STEPS,
        only_with=DEV_NAMED,
        on_resume="free",
    )
    keep_best: bool = option(
        False,
        "end with model and weights of the evaluated step that has the highest best-of-N accuracy "
        "on --dev-file, the earliest of several; the last model is in last/",
        only_with=EVALUATED,
        on_resume="free",
    )
    test_file: str | None = option(
        None, "candidates that are scored once, at the end", on_resume="free", path=True
    )
    compare_with: str | None = option(
        None,
        "compare.json that `bilevel-prm compare` wrote: its rows on the same test file stand in "
        "the printed table beside this run's",
        only_with=TEST_NAMED,
        on_resume="free",
        path=True,
    )
    sanity_check: bool = option(
        False,
        "questions of the test set are in the meta set, or in the dev set of --keep-best, on "
        "purpose: an upper bound for the method, labelled as such in every result",
        only_with=TUNED_AND_TEST,
        on_resume="free",
    )


@dataclass(frozen=True, kw_only=True)
class UpperLevel:
    """Options of the upper level: how and how often the weights move."""

    lr: str = option(
        "auto",
        "learning rate of the upper level; auto: solve for the one that lets a consistently bad "
        "example reach the lower bound within the run",
        name="upper_lr",
        least=0,
        most=MOST_NUMBER,
    )
    optimizer: Literal["adam", "lazy-adam", "sgd"] = option(
        "adam",
        "lazy-adam moves only the rows of a table that were visited",
        name="upper_optimizer",
    )
    betas: tuple[float, float] = option(
        (0.9, 0.999),
        "decay rates of Adam's moments",
        name="upper_betas",
        least=0,
        most=1,
        only_with=UPPER_ADAM,
    )
    weight_decay: float = option(
        0.0,
        "decoupled decay towards the prior (Adam)",
        name="upper_weight_decay",
        least=0,
        most=MOST_NUMBER,
        only_with=UPPER_ADAM,
    )
    schedule: Literal["cosine", "step", "constant"] = option(
        "cosine", "of the upper learning rate", name="upper_schedule"
    )
    warmup: float = option(
        0.0,
        "share of the upper steps with linear warm-up",
        name="upper_warmup",
        least=0,
        most=1,
        only_with=UPPER_COSINE,
    )
    step_size: int = option(
        1000,
        "upper steps between drops of the learning rate",
        name="upper_step_size",
        least=1,
        most=MOST_STEPS,
        only_with=UPPER_STEP,
    )
    gamma: float = option(
        0.95, "factor of each drop", name="upper_gamma", least=0, most=1, only_with=UPPER_STEP
    )
    max_norm: float | None = option(
        None,
        "global-norm clip of the hypergradient; null: none",
        name="upper_max_norm",
        least=0,
        most=MOST_NUMBER,
    )
    meta_batch_size: int = option(64, "solutions per upper step", least=1, most=MOST_EXAMPLES)
    unroll_steps: int = option(1, "lower steps between upper steps", least=1, most=MOST_STEPS)
    start: int = option(
        20,
        "lower steps before the first upper step",
        name="upper_start",
        least=0,
        most=MOST_STEPS,
    )
