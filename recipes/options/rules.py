"""Which options go together: one that would do nothing, or contradict another, is refused.

An option counts as given when it differs from its default, wherever it was given (command line,
preset, Python); at its default it is never refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from recipes.options.resume_point import resume_point
from recipes.options.train import LowerOptions, TrainOptions
from recipes.options.values import OptionError


@dataclass(frozen=True)
class Reading:
    """Options that a run reads only under a condition on others.

    Attributes:
        names: the options.
        when: the condition.
        because: options whose present values are why they are not read.
        remedy: what to give instead.
    """

    names: tuple[str, ...]
    when: Callable[[Any], bool]
    because: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class Contradiction:
    """Options that cannot both be as they are: the condition, those options, what to change."""

    when: Callable[[Any], bool]
    names: tuple[str, ...]
    remedy: str


def _weighted(options: TrainOptions) -> bool:
    return options.weighting != "none"


def _meta_loss(options: TrainOptions) -> bool:
    return _weighted(options) or options.lower_data == "meta"


def _evaluated(options: TrainOptions) -> bool:
    return options.dev_file is not None or options.test_file is not None


_LOWER_READINGS = (
    Reading(
        ("lower_warmup",),
        lambda options: options.lower_schedule == "cosine",
        ("lower_schedule",),
        "use --lower-schedule cosine",
    ),
    Reading(
        ("lower_step_size", "lower_gamma"),
        lambda options: options.lower_schedule == "step",
        ("lower_schedule",),
        "use --lower-schedule step",
    ),
    Reading(
        ("keep_checkpoints",),
        lambda options: options.save_every > 0,
        ("save_every",),
        "use --save-every 1 or more",
    ),
)

_TRAIN_READINGS = (
    Reading(
        (
            *("bound", "bound_low", "bound_high", "prior"),
            *("features", "reference_features", "hidden", "layers", "centre"),
            *("upper_warmup", "upper_step_size", "upper_gamma", "upper_max_norm"),
            *("upper_lr", "upper_optimizer", "upper_betas", "upper_weight_decay"),
            *("upper_schedule", "meta_batch_size", "unroll_steps", "upper_start"),
            *("hypergradient", "route", "order", "direction_decay", "rollback"),
            "difference_radius",
            *("linear_solver", "solver_iterations", "damping", "penalty_strength"),
        ),
        _weighted,
        ("weighting",),
        "use --weighting net, table or domain",
    ),
    Reading(
        ("meta_file", "loss_target"),
        _meta_loss,
        ("weighting", "lower_data"),
        "use a weighting or --lower-data meta",
    ),
    Reading(
        ("bound_low",),
        lambda options: options.bound in ("clip", "clamp"),
        ("bound",),
        "use --bound clip or clamp",
    ),
    Reading(
        ("bound_high",),
        lambda options: options.bound in ("clip", "clamp", "sigmoid"),
        ("bound",),
        "use --bound clip, clamp or sigmoid",
    ),
    Reading(
        ("upper_warmup",),
        lambda options: options.upper_schedule == "cosine",
        ("upper_schedule",),
        "use --upper-schedule cosine",
    ),
    Reading(
        ("upper_step_size", "upper_gamma"),
        lambda options: options.upper_schedule == "step",
        ("upper_schedule",),
        "use --upper-schedule step",
    ),
    Reading(
        ("prior",),
        lambda options: options.weighting in ("net", "table"),
        ("weighting",),
        "use --weighting net or table",
    ),
    Reading(
        ("normalise",),
        lambda options: options.weighting in ("net", "table") or options.weights_file is not None,
        ("weighting", "weights_file"),
        "use --weighting net or table, or --weights-file",
    ),
    Reading(
        ("features", "reference_features", "hidden", "layers", "centre"),
        lambda options: options.weighting == "net",
        ("weighting",),
        "use --weighting net",
    ),
    Reading(
        ("reference_features",),
        lambda options: bool({*options.features} - {"label", "steps", "length", "domain"}),
        ("features",),
        "use a feature that depends on the model",
    ),
    Reading(
        ("upper_betas", "upper_weight_decay"),
        lambda options: options.upper_optimizer != "sgd",
        ("upper_optimizer",),
        "use --upper-optimizer adam or lazy-adam",
    ),
    Reading(
        ("difference_radius",),
        lambda options: options.route == "central-difference",
        ("route",),
        "use --route central-difference",
    ),
    Reading(
        ("route", "order", "direction_decay"),
        lambda options: options.hypergradient == "one-step",
        ("hypergradient",),
        "use --hypergradient one-step",
    ),
    Reading(
        ("linear_solver", "solver_iterations", "damping"),
        lambda options: options.hypergradient == "implicit",
        ("hypergradient",),
        "use --hypergradient implicit",
    ),
    Reading(
        ("penalty_strength",),
        lambda options: options.hypergradient == "penalty",
        ("hypergradient",),
        "use --hypergradient penalty",
    ),
    Reading(
        ("weights_file", "lower_data"),
        lambda options: options.weighting == "none",
        ("weighting",),
        "use --weighting none",
    ),
    Reading(
        ("weights_file", "lower_loss"),
        lambda options: options.lower_data == "train",
        ("lower_data",),
        "use --lower-data train",
    ),
    Reading(
        ("aggregation",),
        lambda options: _meta_loss(options) or _evaluated(options),
        ("weighting", "dev_file", "test_file"),
        "give candidates to score",
    ),
    Reading(
        ("eval_batch_size",),
        lambda options: _weighted(options) or _evaluated(options),
        ("weighting", "dev_file", "test_file"),
        "give candidates to score",
    ),
    Reading(
        ("sanity_check",),
        lambda options: _meta_loss(options) and options.test_file is not None,
        ("weighting", "meta_file", "test_file"),
        "give --meta-file and --test-file",
    ),
    Reading(
        ("model",),
        lambda options: options.init_from is None,
        ("init_from",),
        "use --init-from none",
    ),
)

_LOWER_CONTRADICTIONS = (
    Contradiction(
        lambda options: (
            options.resume is not None
            and Path(options.output_dir) != resume_point(options.resume)[0]
        ),
        ("resume", "output_dir"),
        "a resumed run stays in its directory: leave out --output-dir",
    ),
    Contradiction(
        lambda options: options.on_trouble == "rollback" and options.save_every == 0,
        ("on_trouble", "save_every"),
        "rollback returns to a checkpoint: use --save-every 1 or more, or --on-trouble skip",
    ),
)

_TRAIN_CONTRADICTIONS = (
    Contradiction(
        lambda options: _meta_loss(options) and options.meta_file is None,
        ("weighting", "lower_data", "meta_file"),
        "the meta loss needs --meta-file, solutions with `correct`; without one only "
        "--weighting none --lower-data train is possible",
    ),
    Contradiction(
        lambda options: (
            options.upper_optimizer == "lazy-adam" and options.weighting in ("net", "domain")
        ),
        ("upper_optimizer", "weighting"),
        "lazy-adam moves the rows of a table that were visited: use adam, or --weighting table",
    ),
    Contradiction(
        lambda options: options.weighting == "net" and options.normalise == "table",
        ("normalise", "weighting"),
        "a net has no table to normalise over: use batch or none, or --weighting table",
    ),
    Contradiction(
        lambda options: options.hypergradient == "implicit" and options.lower_weight_decay > 0,
        ("hypergradient", "lower_weight_decay"),
        "weight decay moves the point that the implicit hypergradient assumes: use "
        "--lower-weight-decay 0, or another hypergradient",
    ),
    Contradiction(
        lambda options: options.route == "ghost" and options.order == "lower-first",
        ("route", "order"),
        "ghost needs the meta gradient before the lower step: use --order upper-first, or "
        "--route per-example",
    ),
    Contradiction(
        lambda options: options.route == "dot" and options.batch_size != 1,
        ("route", "batch_size"),
        "dot takes one example per micro-batch: use auto, or --batch-size 1 with a higher "
        "--accumulation",
    ),
)


def unread(options: LowerOptions) -> dict[str, Reading]:
    """The options that a run with these options would not read, each with its (first) reason."""
    readings: Sequence[Reading] = _LOWER_READINGS
    if isinstance(options, TrainOptions):
        readings = (*_TRAIN_READINGS, *readings)
    found: dict[str, Reading] = {}
    for reading in readings:
        for name in reading.names if not reading.when(options) else ():
            found.setdefault(name, reading)
    return found


def check_together(options: LowerOptions) -> None:
    """Refuse options that would do nothing and options that contradict each other.

    Raises:
        OptionError: names all options that would do nothing, or the first contradiction.
    """
    idle: dict[Reading, list[str]] = {}
    for name, reading in unread(options).items():
        if _is_given(options, name):
            idle.setdefault(reading, []).append(name)
    if idle:
        raise OptionError("; ".join(_refusal(options, *item) for item in idle.items()))
    contradictions: Sequence[Contradiction] = _LOWER_CONTRADICTIONS
    if isinstance(options, TrainOptions):
        contradictions = (*contradictions, *_TRAIN_CONTRADICTIONS)
    for contradiction in contradictions:
        if contradiction.when(options):
            raise OptionError(
                f"{_spelled(options, contradiction.names, ' ')}: {contradiction.remedy}"
            )


def _is_given(options: LowerOptions, name: str) -> bool:
    (default,) = (f.default for f in fields(options) if f.name == name)
    return bool(getattr(options, name) != default)


def _refusal(options: LowerOptions, reading: Reading, names: Sequence[str]) -> str:
    verb, them = ("has", "it") if len(names) == 1 else ("have", "them")
    return (
        f"{_spelled(options, names, ', ')} {verb} no effect with "
        f"{_spelled(options, reading.because, ' ')}: leave {them} out, or {reading.remedy}"
    )


def _spelled(options: Any, names: Sequence[str], between: str) -> str:
    return between.join(_option(name, getattr(options, name)) for name in names)


def _option(name: str, value: Any) -> str:
    """As on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, tuple):
        return " ".join([f"--{flag}", *map(str, value)])
    return f"--{flag} {'none' if value is None else value}"
