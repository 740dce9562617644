"""What an option is: a dataclass field with a help text, a minimum and conditions.

A field is an option, a key of a preset and a line in ``args.yaml``, under one flat name. Fields of
a group (``group``) and of the chosen variant (``variants``) are options like all others; the
nesting is for readers of the code, not for users. Nothing here imports torch, so that ``--help``
answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar, Literal

from prm.names import AggregationName, Context

OnResume = Literal["same", "free", "file", "path"]
_ranks = count()


@dataclass(frozen=True, eq=False)
class Condition:
    """When a command reads an option; elsewhere the option would have no effect and is refused.

    Attributes:
        when: Whether the option is read, from all options by flat name.
        because: The options whose present values are why it is not read.
        remedy: What to give instead.
        shown: Added in brackets to the help text of the options; None: nothing.
        text: The refusal, with ``{flags}`` for the options; None: "... has no effect with ...".
        rank: Refusals are reported in the order in which their conditions were defined.
    """

    when: Callable[[Any], bool]
    because: tuple[str, ...] = ()
    remedy: str = ""
    shown: str | None = None
    text: str | None = None
    rank: int = field(default_factory=_ranks.__next__)


def option(
    default: Any,
    help: str,
    *,
    name: str | None = None,
    least: float | None = None,
    only_with: Condition | Sequence[Condition] = (),
    on_resume: OnResume = "same",
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: Its value if not given; ``...`` makes the option required.
        help: What it does, for ``--help``.
        name: Flat name, where it is not that of the field.
        least: Smallest value.
        only_with: Under which conditions a command reads the option: all of them must hold.
        on_resume: What a resumed run may change: nothing ("same"); the value, which decides
            nothing about the steps ("free"); the path, but not the content ("file"); the path,
            whose content is compared in another way ("path").
    """
    conditions = (only_with,) if isinstance(only_with, Condition) else tuple(only_with)
    shown = [condition.shown for condition in conditions if condition.shown]
    metadata = {
        "help": help + (f" ({shown[-1]})" if shown else ""),
        "name": name,
        "least": least,
        "only_with": conditions,
        "on_resume": on_resume,
    }
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def group(kind: Callable[[], Any], *, only_with: Condition | None = None) -> Any:
    """A dataclass field that holds a dataclass of options; all of them read under a condition."""
    conditions = () if only_with is None else (only_with,)
    return field(default_factory=kind, metadata={"group": kind, "only_with": conditions})


def variants(
    default: str,
    help: str,
    kinds: Mapping[str, Callable[[], Any]],
    *,
    listed: Sequence[str] | None = None,
    only_with: Condition | None = None,
) -> Any:
    """A dataclass field that holds one of several dataclasses, chosen by an option of its name.

    Args:
        default: Name of the variant if not given.
        help: What is chosen.
        kinds: Name of a variant -> its dataclass, whose class attribute ``kind`` is that name.
        listed: In which order the variants contribute their options to the flat list; an option
            that several have stands with the last of them.
        only_with: Under which condition a command reads the choice.
    """
    metadata = option(default, help, only_with=() if only_with is None else only_with).metadata
    more = {"variants": kinds, "default": default, "listed": tuple(listed or kinds)}
    return field(default_factory=kinds[default], metadata={**metadata, **more})


@dataclass(frozen=True, kw_only=True)
class PrmOptions:
    """What every command that runs a process reward model needs.

    ``ONLY_WITH`` gives conditions of a command on options that it shares with others.
    """

    ONLY_WITH: ClassVar[Mapping[Condition, tuple[str, ...]]] = {}

    model: str = option(
        "embedded",
        "directory or hub name of the model to start from; 'embedded' is the tiny InternVL that "
        "ships with the package",
        on_resume="path",
    )
    image_root: str | None = option(
        None,
        "folder that image paths are relative to (default: the folder of the data file)",
        on_resume="path",
    )
    allow_outside_images: bool = option(False, "take images outside the image root, too")
    system_prompt: str | None = option(None, "system turn (default: the library's instruction)")
    context: Context = option(
        "plus", "what stands in the label slots of earlier steps, in training and in scoring"
    )
    max_patches: int = option(6, "at most this many tiles per image", least=1)
    threads: int = option(0, "CPU threads of torch (0: all cores)", least=0, on_resume="free")
    seed: int = option(
        0, "fixes initial weights, order of data and everything else random", least=0
    )


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(PrmOptions):
    """What every command that runs the model over a whole file needs."""

    workers: int = option(
        0,
        "processes that make batches ahead of time, images decoded (training: so many for each "
        "level); 0: none. The batches are the same",
        least=0,
        on_resume="free",
    )


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(LoaderOptions):
    """What every command that scores whole solutions needs."""

    aggregation: AggregationName = option(
        "mean", "how the step scores of a solution become its score"
    )
    eval_batch_size: int = option(64, "solutions per forward pass when scoring", least=1)
