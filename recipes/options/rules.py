"""Rules on several options: one that would have no effect, or contradicts another, is refused.

An option counts as given when it differs from its default, wherever it was given (command line,
preset, Python). At its default it is never refused. The condition under which a command reads an
option is defined with the option (``recipes.options.base.Condition``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from recipes.options.base import Condition, flag_of
from recipes.options.conditions import has_meta_loss
from recipes.options.flat import flat_options, flatten
from recipes.options.train import LowerOptions, TrainOptions
from recipes.options.values import OptionError, resume_point


@dataclass(frozen=True)
class Contradiction:
    """Options whose values contradict each other.

    Attributes:
        when: A function of all options by flat name that tells whether they contradict each other.
        names: The flat names of the options.
        remedy: What to change.
    """

    when: Callable[[Any], bool]
    names: tuple[str, ...]
    remedy: str


def words_of(name: str, value: Any) -> list[str]:
    """Return an option with its value as the words of the command line."""
    flag = flag_of(name)
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, tuple):
        return [flag, *map(str, value)]
    return [flag, "none" if value is None else str(value)]


_PROVEN_IN_SHARDS: Mapping[str, tuple[Any, ...]] = {
    "hypergradient": ("one-step",),
    "order": ("upper-first",),
    "route": ("auto", "dot"),
    "upper_gradient_every": (1,),
    "rollback": (False,),
    "batch_size": (1,),
    "loss_target": ("both", "+"),
    "lower_data": ("train",),
    "weights_file": (None,),
    "weighting": ("table", "net", "domain", "none"),
    "execution": ("auto", "resident"),
    "on_trouble": ("raise",),
    "lora_rank": (0,),
    "frozen_activations": ("none",),
    "keep_best": (False,),
    "activation_checkpointing": ("none",),
    "device": ("auto", "cpu"),
    "precision": ("auto", "float32"),
}
"""The values of options for which steps over shards have been shown to be those of one process."""


def _unproven_in_shards(name: str, proven: tuple[Any, ...]) -> Contradiction:
    """Return the rule that ``--sharding full`` goes with certain values of an option alone."""
    instead = " or ".join(" ".join(words_of(name, value)) for value in proven)
    return Contradiction(
        lambda given: (
            given.sharding != "none"
            and getattr(given, name, proven[0]) not in proven  # if it has one
        ),
        ("sharding", name),
        f"not shown to be right over shards: use {instead}, or --sharding none",
    )


_LOWER_CONTRADICTIONS = (
    Contradiction(
        lambda given: (
            given.resume is not None and Path(given.output_dir) != resume_point(given.resume)[0]
        ),
        ("resume", "output_dir"),
        "a resumed run stays in its directory: leave out --output-dir",
    ),
    Contradiction(
        lambda given: given.on_trouble == "rollback" and given.save_every == 0,
        ("on_trouble", "save_every"),
        "rollback returns to a checkpoint: use --save-every 1 or more, or --on-trouble skip",
    ),
    *(_unproven_in_shards(name, proven) for name, proven in _PROVEN_IN_SHARDS.items()),
)

_SECOND_ORDER = ("unrolled", "implicit")
_PER_EXAMPLE = ("dot", "ghost", "per-example")

_TRAIN_CONTRADICTIONS = (
    Contradiction(
        lambda given: has_meta_loss(given) and given.meta_file is None,
        ("weighting", "lower_data", "meta_file"),
        "the meta loss needs --meta-file, solutions with `correct`; without one only "
        "--weighting none --lower-data train is possible",
    ),
    Contradiction(
        lambda given: given.upper_optimizer == "lazy-adam" and given.weighting in ("net", "domain"),
        ("upper_optimizer", "weighting"),
        "lazy-adam moves the rows of a table that were visited: use adam, or --weighting table",
    ),
    Contradiction(
        lambda given: (
            given.sharding != "none" and given.weighting == "net" and "gradient" in given.features
        ),
        ("sharding", "features"),
        "gradients of examples are computed on whole parameters: leave gradient out of --features",
    ),
    Contradiction(
        lambda given: given.weighting == "net" and given.normalise == "table",
        ("normalise", "weighting"),
        "a net has no table to normalise over: use batch or none, or --weighting table",
    ),
    Contradiction(
        lambda given: given.weighting == "labels" and given.route in _PER_EXAMPLE,
        ("weighting", "route"),
        "this route has one product for all steps of an example, and labels need one for each: use "
        "auto, jvp, reverse or central-difference",
    ),
    Contradiction(
        lambda given: given.hypergradient == "implicit" and given.lower_weight_decay > 0,
        ("hypergradient", "lower_weight_decay"),
        "weight decay moves the point that the implicit hypergradient assumes: use "
        "--lower-weight-decay 0, or another hypergradient",
    ),
    Contradiction(
        lambda given: given.route == "ghost" and given.order == "lower-first",
        ("route", "order"),
        "ghost needs the meta gradient before the lower step: use --order upper-first, or "
        "--route per-example",
    ),
    Contradiction(
        lambda given: (
            given.attention == "flash"
            and (given.route in ("jvp", "reverse") or given.hypergradient in _SECOND_ORDER)
        ),
        ("attention", "hypergradient", "route"),
        "FlashAttention can be differentiated once, and backwards: use --attention sdpa, or "
        "--hypergradient one-step with another route",
    ),
    Contradiction(
        lambda given: given.route == "dot" and given.batch_size != 1,
        ("route", "batch_size"),
        "dot takes one example per micro-batch: use auto, or --batch-size 1 with a higher "
        "--accumulation",
    ),
)


def unread(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Condition]:
    """Return the options that a command would not read, each with its first failing condition.

    Args:
        kind: The dataclass of the options.
        values: All values by flat name.
    """
    given = SimpleNamespace(**values)
    reasons = {}
    for name, entry in flat_options(kind).items():
        failed = [condition for condition in entry.conditions if not condition.when(given)]
        if failed:
            reasons[name] = failed[0]
    return reasons


def refuse_unread(kind: type[Any], values: Mapping[str, Any]) -> None:
    """Refuse options that were given and would have no effect.

    Args:
        kind: The dataclass of the options.
        values: All values by flat name.

    Raises:
        OptionError: There are such options. The message names all of them, each with the reason
            and what to change.
    """
    entries = flat_options(kind)
    refused = [
        (condition, name)
        for name, condition in unread(kind, values).items()
        if values[name] != entries[name].default
    ]
    messages: dict[Condition | str, list[str]] = {}
    conditions: dict[Condition | str, Condition] = {}
    for condition, name in sorted(refused, key=lambda pair: pair[0].rank):
        key = condition.text or condition  # conditions with one text share one sentence
        messages.setdefault(key, []).append(name)
        conditions.setdefault(key, condition)
    if messages:
        raise OptionError(
            "; ".join(refusal(conditions[key], names, values) for key, names in messages.items())
        )


def refusal(condition: Condition, names: Sequence[str], values: Mapping[str, Any]) -> str:
    """Return the sentence that refuses options whose condition does not hold.

    Args:
        condition: The condition.
        names: The flat names of the options.
        values: All values by flat name.
    """
    if condition.text is not None:
        flags = ", ".join(map(flag_of, sorted(names)))
        return condition.text.format(flags=flags, **values)
    verb, them = ("has", "it") if len(names) == 1 else ("have", "them")
    return (
        f"{_spelled(values, names, ', ')} {verb} no effect with "
        f"{_spelled(values, condition.because, ' ')}: leave {them} out, or {condition.remedy}"
    )


def refuse_given(options: Any, names: Sequence[str], text: str) -> None:
    """Refuse the given ones of some options, for a reason that is known only within the run.

    Args:
        options: All options.
        names: The flat names of those that would have no effect.
        text: The refusal, with ``{flags}`` for them.

    Raises:
        OptionError: One of them was given.
    """
    values, entries = flatten(options), flat_options(type(options))
    given = [name for name in names if values[name] != entries[name].default]
    if given:
        raise OptionError(refusal(Condition(lambda _: False, text=text), given, values))


def check_together(options: Any) -> None:
    """Refuse options that would have no effect and options that contradict each other.

    Raises:
        OptionError: There are such options. The message names all without effect, or the first
            contradiction.
    """
    values = flatten(options)
    refuse_unread(type(options), values)
    contradictions: Sequence[Contradiction] = ()
    if isinstance(options, LowerOptions):
        contradictions = _LOWER_CONTRADICTIONS
    if isinstance(options, TrainOptions):
        contradictions = (*contradictions, *_TRAIN_CONTRADICTIONS)
    for contradiction in contradictions:
        if contradiction.when(SimpleNamespace(**values)):
            raise OptionError(
                f"{_spelled(values, contradiction.names, ' ')}: {contradiction.remedy}"
            )


def _spelled(values: Mapping[str, Any], names: Sequence[str], between: str) -> str:
    return between.join(" ".join(words_of(name, values[name])) for name in names)
