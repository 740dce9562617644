"""Load the model and the examples of a command, and set threads and seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from prm.batches.prefix_trees import question_batch
from prm.conventions import FILE, Conventions
from prm.data.bad_rows import BadRows
from prm.data.store.encoded import EncodedExamples, located
from prm.data.store.examples import StoredExamples, facts, store_examples
from prm.data.store.outline import Facts
from prm.inputs.collate import Batch, Collator
from prm.inputs.prompt import SYSTEM_PROMPT
from prm.models.adapters import add_lora
from prm.models.model import PRM, is_hub_name, split_parameters
from prm.names import Recomputed, TooLong
from prm.placement import Placement, resolve
from prm.schema import DataError, StepExample
from recipes.bad_rows import bad_rows_of
from recipes.models.conventions import OF_ANSWERS, agreed
from recipes.options.base import OF_MODEL, LoaderOptions, PlacementOptions, PrmOptions
from recipes.options.groups import LoraSettings
from recipes.options.values import OptionError, existing_file, launched_precision
from recipes.terminal import say
from weighting import row_index

EMBEDDED_BASE = Path(__file__).parents[1] / "assets" / "base"
_AT_ONCE = 256


@dataclass(frozen=True)
class Examples:
    """A file of examples, read and tokenised on demand, and the collator that batches them.

    Attributes:
        path: The file.
        examples: The examples themselves.
        collator: What tokenises and batches them.
        lines: The line of each.
        bad: What was left out of the file.
    """

    path: Path
    examples: Sequence[StepExample]
    collator: Collator
    lines: Sequence[int]
    bad: BadRows

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def encoded(self) -> EncodedExamples:
        """The examples tokenised, each when it is asked for."""
        return EncodedExamples(self.examples, self.collator, self.path, self.lines)

    @property
    def facts(self) -> Iterator[Facts]:
        """What is known of each example without reading it again."""
        return facts(self.examples)

    @property
    def pictures(self) -> Iterator[Path]:
        """The picture files of all examples in their order."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.pictures
        return (image for example in self.examples for image in example.images)

    def index(self) -> Mapping[str, int]:
        """Return the row of every id.

        Raises:
            ValueError: Two examples have one id.
        """
        return _index(self.examples)

    def only(self, rows: Sequence[int]) -> Examples:
        """Return the given rows alone."""
        return replace(self, **_only(self, rows))

    def with_rows(
        self, index: Mapping[str, int], domains: Mapping[str, int] | None = None
    ) -> Examples:
        """Return a copy whose batches also hold ``index`` and, if given, ``domain``."""
        return replace(self, collator=self.collator.with_rows(index, domains))

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return the batch of the given rows.

        Raises:
            DataError: The file has changed, or an example cannot be laid out for the model.
        """
        return self.collator(self.encoded.at(rows))

    def question_batch(self, rows: Sequence[int], tree_width: int) -> Batch:
        """Return the batch of the given rows, those of a question as trees (``prm.batches``).

        Raises:
            DataError: The file has changed, or an example cannot be laid out for the model.
        """
        return question_batch(self.collator, self.encoded.at(rows), tree_width)


@dataclass(frozen=True)
class Solutions:
    """A file of examples that no model reads, as ``Examples`` without tokens and images."""

    path: Path
    examples: Sequence[StepExample]
    lines: Sequence[int] = ()
    bad: BadRows = field(default_factory=lambda: BadRows(Path()))

    def __post_init__(self) -> None:
        if len(self.lines) != len(self.examples):  # made by hand: a line each
            object.__setattr__(self, "lines", range(1, len(self.examples) + 1))

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def facts(self) -> Iterator[Facts]:
        """What is known of each example without reading it again."""
        return facts(self.examples)

    def index(self) -> Mapping[str, int]:
        """Return the row of every id.

        Raises:
            ValueError: Two examples have one id.
        """
        return _index(self.examples)

    def only(self, rows: Sequence[int]) -> Solutions:
        """Return the given rows alone."""
        return replace(self, **_only(self, rows))


def _index(examples: Sequence[StepExample]) -> Mapping[str, int]:
    if isinstance(examples, StoredExamples):
        return examples.index()
    return row_index([example.id for example in examples])


def _only(data: Examples | Solutions, rows: Sequence[int]) -> dict[str, Any]:
    """Return the given examples and their lines."""
    if isinstance(data.examples, StoredExamples):
        stored = data.examples.only(rows)
        return {"examples": stored, "lines": stored.lines}
    examples = [data.examples[row] for row in rows]
    return {"examples": examples, "lines": [data.lines[row] for row in rows]}


@dataclass(frozen=True)
class Fault:
    """Why an example cannot be used: the parts of its ``DataError``."""

    field: str
    expected: str
    found: str
    remedy: str


Data = TypeVar("Data", bound=Examples | Solutions)
AnyOptions = TypeVar("AnyOptions", bound=PrmOptions)


def usable(data: Data, fault: Callable[[Facts], Fault | None]) -> Data:
    """Refuse examples with a fault, or leave them out, as ``--on-bad-row`` says.

    Raises:
        DataError: Faults are refused (the error names the first such line), or there are too many.
    """
    bad = set()
    for row, example in enumerate(data.facts):
        found = fault(example)
        if found is not None:
            data.bad.add(DataError(file=data.path, line=data.lines[row], **vars(found)), example.id)
            bad.add(row)
    return _without(data, bad)


def _without(data: Data, bad: Collection[int]) -> Data:
    """Return the examples without the ``bad`` ones, of which there may not be too many."""
    data.bad.check()
    if not bad:
        return data
    return cast(Data, data.only([row for row in range(len(data)) if row not in bad]))


def set_up(options: Any) -> None:
    """Set the threads and every global random state from the options."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    np.random.seed(options.seed % 2**32)
    random.seed(options.seed)


def placement_of(
    options: PlacementOptions, activation_checkpointing: Recomputed = "none"
) -> Placement:
    """Return where and how the model of a command computes.

    Args:
        options: The options of the placement.
        activation_checkpointing: That of a command that trains.

    Raises:
        OptionError: The device is not there, or cannot compute in this precision or attention; or
            ``accelerate launch`` asks for another precision.
    """
    precision = launched_precision(options.precision)
    try:
        return resolve(options.device, precision, options.attention, activation_checkpointing)
    except ValueError as error:
        raise OptionError(f"--{error}") from error


def load_model(
    options: PrmOptions,
    freeze: Sequence[str] = (),
    path: str | None = None,
    placement: Placement | None = None,
    conventions: Conventions | None = None,
    *,
    cloned: bool = True,
) -> tuple[PRM, dict[str, Tensor]]:
    """Load a model, and return it with its trainable parameters by name.

    Its conventions are those by which the command asks it (``asked``).

    Args:
        options: The options of the command.
        freeze: The parts that are not trained.
        path: The value of ``--init-from``, None for ``--model``.
        placement: Where it computes. None means the CPU in float32.
        conventions: How it is asked. None means by ``asked``.
        cloned: Whether the parameters are apart from the model's own.

    Raises:
        OptionError: There is no such model, it is damaged, it or its chat template cannot judge
            steps, an option contradicts its conventions, or ``freeze`` names no part of it.
    """
    placement = placement or Placement()
    name = path if path is not None else options.model
    if path not in (None, "embedded") and not Path(name).is_dir():  # a hub name goes to --model
        raise OptionError(
            f"--init-from {name}: expected a checkpoint folder, found nothing there; "
            "run a cold start first, or correct the path"
        )
    if name == "embedded" and not options.TRAINS:  # --model may have been forgotten
        say("model: the base that ships with the package; --model names another", error=True)
    try:
        prm = placement.load(EMBEDDED_BASE if name == "embedded" else name)
        prm = replace(prm, conventions=conventions or asked(options, prm, name))
        prm.collator()  # refuses chat templates before data are read
    except OptionError:
        raise
    except (OSError, ValueError) as error:
        flag = "--model" if path is None else "--init-from"
        where = " (no folder here, looked up on the hub)" if is_hub_name(name) else ""
        raise OptionError(f"{flag} {name}{where}: {' '.join(str(error).split())}") from error
    try:
        trainable, _ = split_parameters(prm.model, freeze)
    except ValueError as error:
        raise OptionError(f"--freeze: {error}") from error
    try:
        placement.check_trained(trainable, prm)
    except ValueError as error:
        raise OptionError(f"--{error}") from error
    if not cloned:
        return prm, trainable
    return prm, {name: tensor.clone() for name, tensor in trainable.items()}


def asked(options: PrmOptions, prm: PRM, name: str | None = None) -> Conventions:
    """Return how a command asks a model; see ``recipes.models.conventions``.

    Args:
        options: The options of the command. One that is None was not given.
        prm: The model.
        name: Its folder, or its name on a hub. None means that of ``--model``.

    Raises:
        OptionError: An option contradicts the conventions of the model.
    """
    values = {
        "system_prompt": options.system_prompt,
        "context": options.context,
        "max_patches": options.max_patches,
        **{name: getattr(options, name, None) for name in OF_ANSWERS},
    }
    try:
        return agreed(
            prm,
            {name: value for name, value in values.items() if value is not None},
            Path(name or options.model) / FILE,
            trains=options.TRAINS,
            hides_labels=options.HIDES_LABELS,
        )
    except ValueError as error:
        raise OptionError(str(error)) from error


def filled(options: AnyOptions, conventions: Conventions) -> AnyOptions:
    """Return options in which those of the prompt that were not given are the model's."""
    values = {name: getattr(conventions, name) for name in OF_MODEL}
    if values["system_prompt"] == SYSTEM_PROMPT:
        values["system_prompt"] = options.system_prompt  # the library's stays unwritten
    return replace(options, **values)


def adapted(
    prm: PRM, lora: LoraSettings, freeze: Sequence[str], placement: Placement
) -> dict[str, Tensor]:
    """Add adapters to a model, and return their parameters by name: those that are trained.

    Raises:
        OptionError: A target names no linear layer that is not frozen, or nothing is trained of
            what is to be recomputed.
        ModuleNotFoundError: The library peft is not installed.
    """
    try:
        params = add_lora(
            prm.model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, freeze=freeze
        )
    except ValueError as error:
        raise OptionError(f"--lora-targets: {error}") from error
    try:
        placement.check_trained(params, prm)
    except ValueError as error:
        raise OptionError(f"--{error}") from error
    return {name: tensor.clone() for name, tensor in params.items()}


def read_solutions(options: LoaderOptions, path: str) -> Solutions:
    """Read a file that no model reads; images must exist, but are not decoded.

    Raises:
        OptionError: There is no such file.
        DataError: A record cannot be used.
    """
    file = existing_file(path)
    bad = bad_rows_of(options, file, partial(say, error=True))
    examples, _ = store_examples(
        file,
        options.image_root,
        allow_outside_images=options.allow_outside_images,
        bad_rows=bad,
    )
    return Solutions(file, examples, examples.lines, bad)


def read_examples(
    prm: PRM, options: LoaderOptions, path: str, *, too_long: TooLong | None = None
) -> Examples:
    """Read a file of any known format, and check that ``prm`` can judge every example.

    ``too_long`` takes the place of the option.

    An example is tokenised here only if a bound does not show that it fits the model; see
    ``Collator.check``. Images are checked but not kept, because a batch decodes its own: the first
    thousand are decoded, and of the others the headers are read.

    Raises:
        OptionError: There is no such file.
        DataError: A record cannot be used.
    """
    file = existing_file(path)
    bad = bad_rows_of(options, file, partial(say, error=True))
    collator = _collator(prm, options, too_long or options.too_long)
    examples, faults = store_examples(
        file,
        options.image_root,
        check_images="sample",
        allow_outside_images=options.allow_outside_images,
        bad_rows=bad,
        check=collator.check,
    )
    return _checked(Examples(file, examples, collator, examples.lines, bad), faults)


def tokenised(prm: PRM, options: LoaderOptions, data: Examples, *, too_long: TooLong) -> Examples:
    """Return the examples for another model, ``prm``, too long ones refused or cut after steps.

    Raises:
        DataError: An example cannot be laid out for the model.
    """
    collator = _collator(prm, options, too_long)
    found: list[tuple[int, DataError | int]] = []
    for start in range(0, len(data), _AT_ONCE):
        part = collator.check(data.examples[start : start + _AT_ONCE])
        found += [(start + n, what) for n, what in enumerate(part) if what is not None]
    return _checked(replace(data, collator=collator), found)


def _checked(data: Examples, found: Sequence[tuple[int, DataError | int]]) -> Examples:
    """Refuse the examples with faults of layout, or leave them out; cut those that are too long."""
    kept: dict[int, int] = {}
    for row, what in found:
        example, line = data.examples[row], data.lines[row]
        if isinstance(what, DataError):
            data.bad.add(located(what, data.path, line), example.id)
        else:
            data.bad.truncate(line, example.id, len(example.steps), what)
            kept[row] = what
    return _without(cut(data, kept), {row for row, what in found if isinstance(what, DataError)})


def cut(data: Data, steps: Mapping[int, int]) -> Data:
    """Return the examples with the first steps alone of those that ``steps`` names by row."""
    if not steps:
        return data
    examples: Sequence[StepExample]
    if isinstance(data.examples, StoredExamples):
        examples = data.examples.cut(steps)
    else:
        examples = [
            replace(example, steps=example.steps[: steps.get(row)])
            for row, example in enumerate(data.examples)
        ]
    return replace(data, examples=examples)


def _collator(prm: PRM, options: PrmOptions, too_long: TooLong = "refuse") -> Collator:
    return replace(prm, conventions=asked(options, prm)).collator(too_long=too_long)
