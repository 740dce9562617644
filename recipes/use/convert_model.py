"""``bilevel-prm convert-model``: rewrite an InternVL checkpoint for transformers' classes."""

from __future__ import annotations

from pathlib import Path

from prm.models.convert import convert_internvl
from recipes.options.use import ConvertModelOptions
from recipes.options.values import OptionError
from recipes.run.files import check_writable
from recipes.terminal import say


def run_convert_model(options: ConvertModelOptions) -> Path:
    """Convert a local folder, print what was written, and return the output folder.

    Raises:
        OptionError: The folder is not such a checkpoint. The message says what it lacks.
        FileExistsError: The output exists already.
        WriteError: The output cannot be written.
    """
    check_writable("--output", Path(options.output))
    try:
        count = convert_internvl(options.input, options.output)
    except (FileNotFoundError, ValueError) as error:
        raise OptionError(f"--input {options.input}: {' '.join(str(error).split())}") from error
    say(
        f"{options.output}: {count['tensors']} tensors, {count['parameters']} parameters; load "
        f"with --model {options.output}"
    )
    return Path(options.output)
