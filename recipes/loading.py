"""Load the model and the examples of a command, and set threads and seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from prm.data import reader
from prm.data.bad_rows import BadRows
from prm.inputs.collate import Batch, Collator, EncodedExample
from prm.inputs.prompt import SYSTEM_PROMPT
from prm.models.adapters import add_lora
from prm.models.model import PRM, is_hub_name, split_parameters
from prm.names import Recomputed, TooLong
from prm.placement import Placement, resolve
from prm.schema import DataError, StepExample
from recipes.bad_rows import bad_rows_of
from recipes.options.base import LoaderOptions, PlacementOptions, PrmOptions
from recipes.options.groups import LoraSettings
from recipes.options.values import OptionError, existing_file

EMBEDDED_BASE = Path(__file__).parent / "assets" / "base"


@dataclass(frozen=True)
class Examples:
    """A file of examples, which are tokenised once, and the collator that batches them.

    Attributes:
        path: The file.
        encoded: The examples.
        collator: What batches them.
        lines: The line of each.
        bad: What was left out of the file.
    """

    path: Path
    encoded: Sequence[EncodedExample]
    collator: Collator
    lines: Sequence[int]
    bad: BadRows

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def examples(self) -> list[StepExample]:
        """The examples themselves."""
        return [row.example for row in self.encoded]

    @property
    def pictures(self) -> Iterator[Path]:
        """The pictures of all examples in their order."""
        return (image for row in self.encoded for image in row.example.images)

    def only(self, rows: Sequence[int]) -> Examples:
        """Return the given rows alone."""
        encoded, lines = [self.encoded[row] for row in rows], [self.lines[row] for row in rows]
        return replace(self, encoded=encoded, lines=lines)

    def with_rows(
        self, index: Mapping[str, int], domains: Mapping[str, int] | None = None
    ) -> Examples:
        """Return a copy whose batches also hold ``index`` and, if given, ``domain``."""
        return replace(self, collator=self.collator.with_rows(index, domains))

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return the batch of the given rows."""
        return self.collator([self.encoded[row] for row in rows])


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

    def only(self, rows: Sequence[int]) -> Solutions:
        """Return the given rows alone."""
        examples, lines = [self.examples[row] for row in rows], [self.lines[row] for row in rows]
        return replace(self, examples=examples, lines=lines)


@dataclass(frozen=True)
class Fault:
    """Why an example cannot be used: the parts of its ``DataError``."""

    field: str
    expected: str
    found: str
    remedy: str


Data = TypeVar("Data", bound=Examples | Solutions)


def usable(data: Data, fault: Callable[[StepExample], Fault | None]) -> Data:
    """Refuse examples with a fault, or leave them out, as ``--on-bad-row`` says.

    Raises:
        DataError: Faults are refused (the error names the first such line), or there are too many.
    """
    good = []
    for row, example in enumerate(data.examples):
        found = fault(example)
        if found is None:
            good.append(row)
        else:
            data.bad.add(DataError(file=data.path, line=data.lines[row], **vars(found)), example.id)
    data.bad.check()
    return data if len(good) == len(data) else cast(Data, data.only(good))


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
        OptionError: The device is not there, or cannot compute in this precision or attention.
    """
    settings = (options.device, options.precision, options.attention)
    try:
        return resolve(*settings, activation_checkpointing)
    except ValueError as error:
        raise OptionError(f"--{error}") from error


def load_model(
    options: PrmOptions,
    freeze: Sequence[str] = (),
    path: str | None = None,
    placement: Placement | None = None,
) -> tuple[PRM, dict[str, Tensor]]:
    """Load a model, and return it with its trainable parameters by name.

    Args:
        options: The options of the command.
        freeze: The parts that are not trained.
        path: The value of ``--init-from``, None for ``--model``.
        placement: Where it computes. None means the CPU in float32.

    Raises:
        OptionError: There is no such model, it is damaged, it or its chat template cannot judge
            steps, or ``freeze`` names no part of it.
    """
    placement = placement or Placement()
    name = path if path is not None else options.model
    if path not in (None, "embedded") and not Path(name).is_dir():  # a hub name goes to --model
        raise OptionError(
            f"--init-from {name}: expected a checkpoint folder, found nothing there; "
            "run a cold start first, or correct the path"
        )
    try:
        prm = placement.load(EMBEDDED_BASE if name == "embedded" else name)
        _collator(prm, options)  # refuses chat templates before data are read
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
    return prm, {name: tensor.clone() for name, tensor in trainable.items()}


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
    bad = bad_rows_of(options, file)
    examples, lines = reader.read_rows(
        file,
        options.image_root,
        allow_outside_images=options.allow_outside_images,
        bad_rows=bad,
    )
    return Solutions(file, examples, lines, bad)


def read_examples(
    prm: PRM, options: LoaderOptions, path: str, *, too_long: TooLong | None = None
) -> Examples:
    """Read a file of any known format and tokenise it for ``prm``.

    ``too_long`` takes the place of the option.

    Images are checked but not kept, because a batch decodes its own: the first thousand are
    decoded, and of the others the headers are read.

    Raises:
        OptionError: There is no such file.
        DataError: A record cannot be used.
    """
    file = existing_file(path)
    bad = bad_rows_of(options, file)
    examples, lines = reader.read_rows(
        file,
        options.image_root,
        check_images="sample",
        allow_outside_images=options.allow_outside_images,
        bad_rows=bad,
    )
    data = Solutions(file, examples, lines, bad)
    return tokenised(prm, options, data, too_long=too_long or options.too_long)


def tokenised(
    prm: PRM, options: LoaderOptions, data: Examples | Solutions, *, too_long: TooLong
) -> Examples:
    """Return the examples tokenised for ``prm``, too long ones refused or cut after whole steps.

    Raises:
        DataError: An example cannot be laid out for the model.
    """
    collator = _collator(prm, options, too_long)
    encoded, at = [], []
    results = collator.encode_many(data.examples)
    for example, line, result in zip(data.examples, data.lines, results, strict=True):
        if isinstance(result, DataError):
            data.bad.add(_located(result, data.path, line), example.id)
        else:
            encoded.append(result)
            at.append(line)
            kept = len(result.example.steps)
            if kept < len(example.steps):
                data.bad.truncate(line, example.id, len(example.steps), kept)
    data.bad.check()
    return Examples(data.path, encoded, collator, at, data.bad)


def _collator(prm: PRM, options: PrmOptions, too_long: TooLong = "refuse") -> Collator:
    return prm.collator(
        too_long=too_long,
        context=options.context,
        system_prompt=SYSTEM_PROMPT if options.system_prompt is None else options.system_prompt,
        max_patches=options.max_patches,
    )


def _located(error: DataError, file: Path, line: int) -> DataError:
    """Return an error of an example with its line, unless it names a file of its own."""
    if error.file is not None:
        return error
    return error.copy(file=file, line=line)
