"""Options: dataclass fields with a help text, limits and conditions.

A field is an option, a key of a preset and a line in ``args.yaml``, all under one flat name. Fields
of a group (``group``) and of the chosen variant (``variants``) are options like all others: the
nesting is for readers of the code, not for users. This module does not import torch, so that
``--help`` responds at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar, Literal

from prm.names import AggregationName, Attention, Context, OnBadRow, Precision, TooLong

OnResume = Literal["same", "free", "file", "path"]

# Largest values of options, far beyond what is of use and within what can be computed.
MOST_STEPS = 10**7
MOST_EXAMPLES = 2**16
"""In a batch."""
MOST_ROWS = 10**9
"""In a file."""
MOST_SEED = 10**11
"""The seeds that are derived from it then have less than 63 bits."""
MOST_THREADS = 1024
MOST_NUMBER = 10**6
"""Of learning rates, weights and other numbers that float32 holds with their squares."""

OF_MODEL = ("system_prompt", "context", "max_patches")
"""Options that are the model's where they are not given (``recipes.models.conventions``)."""

_ranks = count()


@dataclass(frozen=True, eq=False)
class Condition:
    """When a command reads an option; otherwise it would have no effect and is refused.

    Attributes:
        when: A function of all options by flat name that tells whether the option is read.
        because: The options whose values are the reason why it is not read.
        remedy: What to give instead.
        shown: A text added in brackets to the help of the options, or None.
        text: The refusal, with ``{flags}`` for the options. With None, the text is "... has no
            effect with ...".
        rank: The position in which refusals are reported, that of the condition's definition.
    """

    when: Callable[[Any], bool]
    because: tuple[str, ...] = ()
    remedy: str = ""
    shown: str | None = None
    text: str | None = None
    rank: int = field(default_factory=_ranks.__next__)


def flag_of(name: str) -> str:
    """Return an option's flat name as the command line has it: ``--upper-lr`` of ``upper_lr``."""
    return f"--{name.replace('_', '-')}"


def option(
    default: Any,
    help: str,
    *,
    name: str | None = None,
    least: float | None = None,
    most: float | None = None,
    only_with: Condition | Sequence[Condition] = (),
    on_resume: OnResume = "same",
    path: bool = False,
) -> Any:
    """Return a dataclass field that is an option.

    Args:
        default: The default value. With ``...`` the option is required.
        help: The text for ``--help``.
        name: The flat name, if it is not the name of the field.
        least: The smallest value that is allowed. Every number has one, and a largest.
        most: The largest value that is allowed.
        only_with: The conditions under which a command reads the option. All of them must hold.
        on_resume: What a resumed run may change: nothing ("same"); the value, which has no effect
            on the steps ("free"); the path, but not the content ("file"); or the path, whose
            content is compared in another way ("path").
        path: Whether the value names a file or folder that the run reads.
    """
    conditions = (only_with,) if isinstance(only_with, Condition) else tuple(only_with)
    shown = [condition.shown for condition in conditions if condition.shown]
    metadata = {
        "help": help + (f" ({shown[-1]})" if shown else ""),
        "name": name,
        "least": least,
        "most": most,
        "only_with": conditions,
        "on_resume": on_resume,
        "path": path or on_resume in ("file", "path"),
    }
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def group(kind: Callable[[], Any], section: str, *, only_with: Condition | None = None) -> Any:
    """Return a field that holds a dataclass of options, all of them read under one condition.

    Args:
        kind: The dataclass.
        section: The heading that ``--help`` lists them under.
        only_with: The condition under which a command reads them.
    """
    conditions = () if only_with is None else (only_with,)
    metadata = {"group": kind, "section": section, "only_with": conditions}
    return field(default_factory=kind, metadata=metadata)


def variants(
    default: str,
    help: str,
    kinds: Mapping[str, Callable[[], Any]],
    *,
    listed: Sequence[str] | None = None,
    only_with: Condition | None = None,
) -> Any:
    """Return a field that holds one of several dataclasses, chosen by an option of its name.

    Args:
        default: The name of the default variant.
        help: The text for ``--help``.
        kinds: The dataclass of every variant by name. Its class attribute ``kind`` is that name.
        listed: The order in which the flat list has the options of the variants. An option of
            several variants is listed with the last of them.
        only_with: The condition under which a command reads the choice.
    """
    metadata = option(default, help, only_with=() if only_with is None else only_with).metadata
    more = {"variants": kinds, "default": default, "listed": tuple(listed or kinds)}
    return field(default_factory=kinds[default], metadata={**metadata, **more})


@dataclass(frozen=True, kw_only=True)
class PrmOptions:
    """Options of every command that runs a process reward model.

    ``ONLY_WITH`` holds the conditions of a command on options that it shares with others.
    """

    ONLY_WITH: ClassVar[Mapping[Condition, tuple[str, ...]]] = {}
    TRAINS: ClassVar[bool] = False
    """Whether the command trains the model, and so sets how it is asked."""
    HIDES_LABELS: ClassVar[bool] = False
    """Whether the labels of the rows that are judged must not reach the model."""

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
    system_prompt: str | None = option(
        None, "system turn (default: the model's, or else the library's instruction)"
    )
    context: Context | None = option(
        None,
        "what stands in the label slots of earlier steps, in training and in scoring (default: as "
        "the model was trained, or else plus)",
    )
    max_patches: int | None = option(
        None,
        "at most this many tiles per image (default: as the model was trained, or else 6)",
        least=1,
        most=256,
    )
    threads: int = option(
        0, "CPU threads of torch (0: all cores)", least=0, most=MOST_THREADS, on_resume="free"
    )
    seed: int = option(
        0,
        "fixes initial weights, order of data and everything else random",
        least=0,
        most=MOST_SEED,
    )


SKIPS = Condition(
    lambda given: given.on_bad_row == "skip",
    ("on_bad_row",),
    "use --on-bad-row skip",
    shown="skip",
)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What every command does with rows that it cannot use."""

    on_bad_row: OnBadRow = option(
        "refuse",
        "what a row that cannot be used, or a candidate of it, leads to: an error; or it is left "
        "out, counted, and listed in a file beside the output (.skipped.jsonl)",
        on_resume="free",
    )
    max_bad_rows: float = option(
        0.1,
        "largest share of a file's rows that is left out; of more, the file is refused",
        least=0,
        most=1,
        only_with=SKIPS,
        on_resume="free",
    )


def tokens_per_batch(*, only_with: Condition | Sequence[Condition] = ()) -> Any:
    """Return the option ``tokens_per_batch``, for a command that scores with a model."""
    return option(
        2**16,
        "most tokens per forward pass when scoring, padding and the patches of pictures included; "
        "a single solution may have more",
        least=1,
        most=MOST_ROWS,
        only_with=only_with,
    )


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """Where and how the model computes (``prm.placement``)."""

    device: str = option(
        "auto",
        "what computes: cpu, cuda (the first), cuda:N, or mps; auto: cuda if there is one, else "
        "cpu",
        on_resume="free",
    )
    # What it comes to, not what is asked for, is compared (recipes.run.identity).
    precision: Literal["auto", Precision] = option(
        "auto",
        "float32; bf16: float32 parameters, and a body of the model that computes in bfloat16 "
        "(autocast); bf16-pure: parameters in bfloat16, too, as in DreamPRM-1.5; auto: bf16 on "
        "cuda, else float32",
        on_resume="free",
    )
    attention: Attention = option(
        "auto",
        "kernel of the attention; flash: FlashAttention 2, on cuda in 16 bits; auto: what "
        "transformers takes for the model",
        on_resume="free",
    )


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(ReadOptions, PrmOptions):
    """Options of every command that runs the model over a whole file."""

    placement: PlacementOptions = group(PlacementOptions, "device and precision")
    too_long: TooLong = option(
        "refuse",
        "what a solution longer than the model's context leads to: it is a row that cannot be used "
        "(--on-bad-row); or its first steps, as many as fit, are kept, which is counted and listed "
        "in a file beside the output (.truncated.jsonl). A meta set is never cut",
    )
    workers: int = option(
        0,
        "processes that make batches ahead of time, images decoded (training: so many for each "
        "level); 0: none. The batches are the same",
        least=0,
        most=256,
        on_resume="free",
    )


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(LoaderOptions):
    """Options of every command that scores whole solutions."""

    aggregation: AggregationName | None = option(
        None,
        "how the step scores of a solution become its score (default: the model's, or else mean)",
    )
    eval_batch_size: int = option(
        64, "most solutions per forward pass when scoring", least=1, most=MOST_EXAMPLES
    )
    tokens_per_batch: int = tokens_per_batch()
