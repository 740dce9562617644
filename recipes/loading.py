"""Load the model and the examples of a command, and set threads and seeds."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prm.data import reader
from prm.inputs.collate import Batch, Collator, EncodedExample
from prm.inputs.prompt import SYSTEM_PROMPT
from prm.models.model import PRM, is_hub_name, load_prm, split_parameters
from prm.schema import StepExample
from recipes.options.base import PrmOptions
from recipes.options.values import OptionError

EMBEDDED_BASE = Path(__file__).parent / "assets" / "base"


@dataclass(frozen=True)
class Examples:
    """A file of examples, which are tokenised once, and the collator that batches them."""

    path: Path
    encoded: Sequence[EncodedExample]
    collator: Collator

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def examples(self) -> list[StepExample]:
        """The examples themselves."""
        return [row.example for row in self.encoded]

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
    """A file of examples that no model reads: without tokens and decoded images."""

    path: Path
    examples: Sequence[StepExample]

    def __len__(self) -> int:
        return len(self.examples)


def set_up(options: Any) -> None:
    """Set the threads and every global random state from the options."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    np.random.seed(options.seed % 2**32)
    random.seed(options.seed)


def load_model(
    options: PrmOptions, freeze: Sequence[str] = (), path: str | None = None
) -> tuple[PRM, dict[str, Tensor]]:
    """Load a model, and return it with its trainable parameters by name.

    Raises:
        OptionError: There is no such model, it is damaged, it or its chat template cannot judge
            steps, or ``freeze`` names no part of it.
    """
    name = path if path is not None else options.model
    if path not in (None, "embedded") and not Path(name).is_dir():  # a hub name goes to --model
        raise OptionError(
            f"--init-from {name}: expected a checkpoint folder, found nothing there; "
            "run a cold start first, or correct the path"
        )
    try:
        prm = load_prm(EMBEDDED_BASE if name == "embedded" else name)
        _collator(prm, options)  # refuses chat templates before data are read
    except (OSError, ValueError) as error:
        flag = "--model" if path is None else "--init-from"
        where = " (no folder here, looked up on the hub)" if is_hub_name(name) else ""
        raise OptionError(f"{flag} {name}{where}: {' '.join(str(error).split())}") from error
    try:
        trainable, _ = split_parameters(prm.model, freeze)
    except ValueError as error:
        raise OptionError(f"--freeze: {error}") from error
    return prm, {name: tensor.clone() for name, tensor in trainable.items()}


def read_solutions(options: PrmOptions, path: str) -> Solutions:
    """Read a file that no model reads; images must exist, but are not decoded.

    Raises:
        OptionError: There is no such file.
        DataError: A record cannot be used.
    """
    file = _existing(path)
    return Solutions(
        file,
        reader.read_examples(
            file, options.image_root, allow_outside_images=options.allow_outside_images
        ),
    )


def read_examples(prm: PRM, options: PrmOptions, path: str) -> Examples:
    """Read a file of any known format and tokenise it for ``prm``.

    Images are checked but not kept, because a batch decodes its own: the first thousand are
    decoded, and of the others the headers are read.

    Raises:
        OptionError: There is no such file.
        DataError: A record cannot be used.
    """
    file = _existing(path)
    examples = reader.read_examples(
        file,
        options.image_root,
        check_images="sample",
        allow_outside_images=options.allow_outside_images,
    )
    collator = _collator(prm, options)
    return Examples(file, [collator.encode(example) for example in examples], collator)


def _collator(prm: PRM, options: PrmOptions) -> Collator:
    return prm.collator(
        context=options.context,
        system_prompt=SYSTEM_PROMPT if options.system_prompt is None else options.system_prompt,
        max_patches=options.max_patches,
    )


def _existing(path: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise OptionError(f"{path}: no such file; check the path, or write the data first")
    return file
