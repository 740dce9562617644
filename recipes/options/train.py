"""Options of the commands: dataclasses, read from the command line and from YAML presets.

A field is an option, a key of a preset and a line in ``args.yaml``, under one name. What is said on
the command line wins over the preset, the preset over the default. Nothing here imports torch, so
that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from recipes.options.resume_point import resume_point
from recipes.options.values import OptionError as OptionError
from recipes.options.values import convert, did_you_mean, element, shortened
from recipes.options.yaml_file import read_yaml

Options = TypeVar("Options")
PRESETS = Path(__file__).parents[1] / "presets"
_LEAST = {
    "accumulation": 1,
    "batch_size": 1,
    "draw": 0,
    "eval_batch_size": 1,
    "keep_checkpoints": 0,
    "log_every": 1,
    "lower_step_size": 1,
    "lower_weight_decay": 0,
    "max_patches": 1,
    "meta_batch_size": 1,
    "save_every": 0,
    "seed": 0,
    "seeds": 1,
    "solver_iterations": 1,
    "steps": 0,
    "threads": 0,
    "unroll_steps": 1,
    "upper_start": 0,
    "upper_step_size": 1,
    "upper_weight_decay": 0,
    "workers": 0,
}
"""Smallest value of the options that have one and that no constructor checks by name."""


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text; ``...`` as default makes the option required."""
    if default is ...:
        return field(metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class PrmOptions:
    """What every command that runs a process reward model needs."""

    model: str = option(
        "embedded",
        "directory or hub name of the model to start from; 'embedded' is the tiny InternVL that "
        "ships with the package",
    )
    image_root: str | None = option(
        None, "folder that image paths are relative to (default: the folder of the data file)"
    )
    allow_outside_images: bool = option(False, "take images outside the image root, too")
    system_prompt: str | None = option(None, "system turn (default: the library's instruction)")
    context: Literal["plus", "gold", "masked"] = option(
        "plus", "what stands in the label slots of earlier steps, in training and in scoring"
    )
    max_patches: int = option(6, "at most this many tiles per image")
    threads: int = option(0, "CPU threads of torch (0: all cores)")
    seed: int = option(0, "fixes initial weights, order of data and everything else random")


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(PrmOptions):
    """What every command that runs the model over a whole file needs."""

    workers: int = option(
        0,
        "processes that make batches ahead of time, images decoded (training: so many for each "
        "level); 0: none. The batches are the same",
    )


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(LoaderOptions):
    """What every command that scores whole solutions needs."""

    aggregation: Literal[
        "mean", "min", "max", "last", "product", "log_mean", "logit_mean", "logit_sum"
    ] = option("mean", "how the step scores of a solution become its score")
    eval_batch_size: int = option(64, "solutions per forward pass when scoring")


@dataclass(frozen=True, kw_only=True)
class LowerOptions(LoaderOptions):
    """Training of the process reward model itself: the lower level."""

    train_file: str = option(..., "JSONL with step labels")
    output_dir: str = option(..., "run directory; must not hold a run yet")
    on_existing: Literal["refuse", "number"] = option(
        "refuse", "when it holds a run: refuse, or append the next free number to its name"
    )
    freeze: tuple[str, ...] = option(
        (), "name prefixes of modules that are not trained, for example vision_tower"
    )
    steps: int = option(300, "lower-level optimizer steps")
    batch_size: int = option(32, "examples per micro-batch")
    accumulation: int = option(1, "micro-batches per lower step")
    lower_lr: float = option(5e-4, "peak learning rate of AdamW")
    lower_betas: tuple[float, float] = option((0.9, 0.98), "decay rates of Adam's moments")
    lower_weight_decay: float = option(0.01, "decoupled weight decay")
    lower_warmup: float = option(0.05, "share of the steps with linear warm-up (cosine)")
    lower_schedule: Literal["cosine", "step", "constant"] = option(
        "cosine",
        "cosine: warm-up, then down to 0; step: times --lower-gamma every --lower-step-size "
        "steps; constant: the peak at every step",
    )
    lower_step_size: int = option(1000, "steps between drops of the learning rate (step)")
    lower_gamma: float = option(0.95, "factor of each drop (step)")
    lower_max_norm: float | None = option(1.0, "global-norm clip of the gradient; null: none")
    lower_loss: Literal["cross-entropy", "squared"] = option(
        "cross-entropy", "loss of a step: squared is the distance from soft labels of DreamPRM 1.0"
    )
    probability: Literal["labels", "vocabulary"] = option(
        "labels",
        "softmax of the losses of both levels and of scores, over the two labels or, as in "
        "DreamPRM-1.5, over the whole vocabulary",
    )
    log_every: int = option(10, "steps between lines of log.jsonl")
    save_every: int = option(0, "lower steps between checkpoints; 0: none")
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep; 0: all")
    resume: str | None = option(
        None,
        "directory of an interrupted run: go on from its newest checkpoint, with the options of "
        "its args.yaml; or one of its checkpoints, RUN/checkpoints/step-N",
    )
    on_trouble: Literal["raise", "skip", "rollback"] = option(
        "raise",
        "what a loss, gradient, hypergradient, weight or parameter that is not finite, or an "
        "exploding hypergradient, leads to: end the run before that step, leave the step out, or "
        "return to the last checkpoint of --save-every and go on with the data",
    )
    progress: bool = option(True, "show a progress bar")


@dataclass(frozen=True, kw_only=True)
class ColdStartOptions(LowerOptions):
    """A short supervised pass over a random draw of the training file; all weights 1."""

    draw: int = option(300, "examples drawn from the training file; 0: all")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LowerOptions, ScoringOptions):
    """Bilevel training with instance weights, then evaluation."""

    init_from: str | None = option(
        None, "model directory of a cold start; default: start from --model"
    )
    # data of the upper level and of the evaluation
    meta_file: str | None = option(None, "JSONL with `correct`: solutions that trusted the answer")
    dev_file: str | None = option(None, "candidates that may be looked at while tuning")
    test_file: str | None = option(None, "candidates that are scored once, at the end")
    sanity_check: bool = option(
        False,
        "the meta set is the test set, on purpose: an upper bound for the method, labelled as such "
        "in every result",
    )
    # weighting
    weighting: Literal["net", "table", "domain", "none"] = option(
        "net", "Instance Net, Instance Table, Domain Table, or none: all weights 1 (No Selection)"
    )
    weights_file: str | None = option(
        None, "weights.jsonl of an earlier run: train with these weights, fixed (weighting none)"
    )
    lower_data: Literal["train", "meta"] = option(
        "train",
        "meta: train on the meta loss itself, plain fine-tuning on the meta set (weighting none)",
    )
    bound: Literal["clip", "clamp", "sigmoid", "softplus", "leaky-relu", "relu", "none"] = option(
        "sigmoid",
        "map from raw weights to weights; clip lets a weight that was pushed to an end come back, "
        "clamp (DreamPRM-1.5) does not",
    )
    bound_low: float = option(0.0, "lower end of the range (clip, clamp)")
    bound_high: float = option(2.0, "upper end of the range (clip, clamp, sigmoid)")
    normalise: Literal["batch", "table", "none"] = option(
        "batch",
        "mean 1 within the batch, over the whole table or weights file, or no normalisation (net, "
        "table, weights file)",
    )
    prior: float = option(
        1.0, "weight of every instance at the start, and where decay pulls (net, table)"
    )
    centre: bool = option(
        True, "subtract the mean of the batch from what Instance Net says of its examples"
    )
    features: tuple[str, ...] = option(
        ("label", "p_label", "p_plus"),
        "inputs of Instance Net: of each step p_plus, p_minus, label, p_label, loss; of the "
        "example steps (how many), length (tokens), domain",
    )
    reference_features: bool = option(
        True,
        "give Instance Net the same features by the PRM as it was at the start, too: what the "
        "model said of a label before it could memorise it",
    )
    hidden: int = option(10, "units per hidden layer of Instance Net")
    layers: int = option(1, "hidden layers of Instance Net")
    # upper level
    upper_lr: str = option(
        "auto",
        "learning rate of the upper level; auto: solve for the one that lets a consistently bad "
        "example reach the lower bound within the run",
    )
    upper_optimizer: Literal["adam", "lazy-adam", "sgd"] = option(
        "adam", "lazy-adam moves only the rows of a table that were visited"
    )
    upper_betas: tuple[float, float] = option((0.9, 0.999), "decay rates of Adam's moments")
    upper_weight_decay: float = option(0.0, "decoupled decay towards the prior (Adam)")
    upper_schedule: Literal["cosine", "step", "constant"] = option(
        "cosine", "of the upper learning rate"
    )
    upper_warmup: float = option(0.0, "share of the upper steps with linear warm-up (cosine)")
    upper_step_size: int = option(1000, "upper steps between drops of the learning rate (step)")
    upper_gamma: float = option(0.95, "factor of each drop (step)")
    upper_max_norm: float | None = option(None, "global-norm clip of the hypergradient; null: none")
    meta_batch_size: int = option(64, "solutions per upper step")
    unroll_steps: int = option(1, "lower steps between upper steps")
    upper_start: int = option(20, "lower steps before the first upper step")
    loss_target: Literal["both", "+", "pairs"] = option(
        "both",
        "meta loss: squared distance from right (both, +: as in DreamPRM-1.5), or of the "
        "difference of right and wrong candidates of a question from 1 (pairs)",
    )
    # hypergradient
    hypergradient: Literal["one-step", "unrolled", "implicit", "penalty"] = option(
        "one-step",
        "through the last lower step of a window, through all of its --unroll-steps, at its end as "
        "if the lower level were solved, or by a penalty on a second copy of the model",
    )
    route: Literal[
        "auto", "dot", "ghost", "per-example", "jvp", "reverse", "central-difference"
    ] = option("auto", "how the mixed second-order product is computed (one-step)")
    difference_radius: float | None = option(
        None,
        "length of the shift of the parameters (central-difference); null: from their size and "
        "precision; Betty's, and so DreamPRM-1.5's, is 0.01",
    )
    order: Literal["upper-first", "lower-first"] = option(
        "upper-first", "evaluate the meta gradient before or after the lower step (one-step)"
    )
    direction_decay: float = option(
        0.9, "exponential average of the meta gradient; 0: none (one-step)"
    )
    linear_solver: Literal["nystrom", "cg", "neumann"] = option(
        "nystrom", "of the system with the Hessian of the training loss (implicit)"
    )
    solver_iterations: int = option(
        10, "its iterations; nystrom: directions, which are kept in memory (implicit)"
    )
    damping: float = option(0.1, "added to the Hessian's diagonal (implicit)")
    penalty_strength: float = option(
        10.0,
        "how strongly the copy is held to the training loss; its error falls with 1 / this "
        "(penalty)",
    )
    rollback: bool = option(
        False, "redo the lower step (all of a window but with one-step) with the updated weights"
    )


def build_parser(
    parser: argparse.ArgumentParser, options: type[Any], *, preset: bool = True
) -> None:
    """Give ``parser`` one option per field of ``options`` and ``--config`` for a preset."""
    if preset:
        parser.add_argument(
            "--config", metavar="YAML", help="preset: a file, or the name of a shipped one"
        )
    hints = get_type_hints(options)
    for f in fields(options):
        required = f.default is MISSING
        default = "required" if required else f"default: {_show(f.default)}"
        # argparse formats help with %, so a literal one must be doubled.
        text = f"{f.metadata['help']} ({default})".replace("%", "%%")
        flags = list(dict.fromkeys([f"--{f.name.replace('_', '-')}", f"--{f.name}"]))
        common: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
        kind, many = element(hints[f.name])
        if kind is bool:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
        elif get_origin(kind) is Literal:
            parser.add_argument(*flags, choices=get_args(kind), **common)
        else:
            parser.add_argument(
                *flags, nargs="*" if many else None, metavar=f.name.upper().split("_")[-1], **common
            )


def resolve(options: type[Options], given: Mapping[str, Any]) -> Options:
    """Merge what the command line gave, the preset that it names and the defaults.

    With ``resume`` the options of that run take the place of a preset.

    Raises:
        OptionError: unknown preset or key (with the nearest name), a value of the wrong type,
            outside the choices or too small, a required option that is missing.
    """
    given = dict(given)
    preset = given.pop("config", None)
    values: dict[str, Any] = {}
    resumed = given.get("resume") not in (None, "none", "null")
    if resumed and preset is not None:
        raise OptionError("--resume takes the options from the run's args.yaml; leave out --config")
    if resumed or preset is not None:
        path = _args_path(given["resume"]) if resumed else _preset_path(str(preset))
        preset_values = {key.replace("-", "_"): value for key, value in read_yaml(path).items()}
        values = _convert_all(options, preset_values, str(path))
    if resumed:
        values["output_dir"] = str(resume_point(given["resume"])[0])
    values.update(_convert_all(options, given, "command line"))
    missing = [
        f.name
        for f in fields(options)  # type: ignore[arg-type]
        if f.default is MISSING and f.name not in values
    ]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise OptionError(f"missing {flags}; give it on the command line or in the preset")
    for name, value in values.items():
        if name in _LEAST and not value >= _LEAST[name]:
            flag = name.replace("_", "-")
            raise OptionError(f"--{flag}: expected {_LEAST[name]} or more, found {value}")
    return options(**values)


def to_yaml(options: Any) -> str:
    """All options of a run as YAML that ``--config`` reads back to the same options."""
    content = {
        f.name: list(value) if isinstance(value := getattr(options, f.name), tuple) else value
        for f in fields(options)
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _preset_path(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(PRESETS.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    raise OptionError(
        f"--config {name}: no such file, and no shipped preset of that name "
        f"({', '.join(shipped) or 'none shipped'})" + did_you_mean(name, shipped)
    )


def _args_path(run: str) -> Path:
    path = resume_point(run)[0] / "args.yaml"
    if not path.is_file():
        raise OptionError(f"--resume {run}: expected the directory of a run, found no {path}")
    return path


def _convert_all(options: type[Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = get_type_hints(options)
    names = [f.name for f in fields(options)]
    for name in given:
        if name not in names:
            shown = shortened(repr(name))
            raise OptionError(f"{where}: unknown option {shown}{did_you_mean(name, names)}")
    return {name: convert(value, hints[name], f"{where}: {name}") for name, value in given.items()}
