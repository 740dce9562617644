"""Convert a value of the command line or of YAML to the type of an option."""

from __future__ import annotations

import difflib
import math
import os
import re
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from prm.names import Precision

_SHOWN = 200
_MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"


class OptionError(ValueError):
    """An option or preset cannot be used; the message says what to change."""


def existing_file(path: str) -> Path:
    """Return the path of a file of rows.

    Raises:
        OptionError: There is no such file, or it can be read only once.
    """
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise OptionError(f"{path}: is a folder; name the file of rows in it")
    if file.exists():
        raise OptionError(
            f"{path}: is a pipe or a device, which can be read only once; save the rows in a file"
        )
    raise OptionError(f"{path}: no such file; check the path, or write the data first")


@contextmanager
def blaming(flags: str) -> Iterator[None]:
    """Turn the ``ValueError`` of a constructor into an ``OptionError`` that names ``flags``.

    Args:
        flags: The options that give the constructor's arguments, as on the command line.

    Raises:
        OptionError: The body raised a ``ValueError``.
    """
    try:
        yield
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(f"{flags}: {error}") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message with the nearest known word, if one is near."""
    nearest = difflib.get_close_matches(word[:_SHOWN], known, 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def shortened(text: str, most: int = _SHOWN) -> str:
    """Return ``text`` shortened to at most so many characters, for a message."""
    return text if len(text) <= most else text[: most - 3] + "..."


def resume_point(resume: str) -> tuple[Path, int | None]:
    """Return the run directory and the step of the checkpoint that ``--resume`` names.

    ``runs/x`` is a run, and ``runs/x/checkpoints/step-40`` is a checkpoint of it.

    Returns:
        The run directory, and the step of the checkpoint, None for the newest.
    """
    path = Path(resume)
    named = re.fullmatch(r"step-(\d{1,18})", path.name)
    if named is None or path.parent.name != "checkpoints":
        return path, None
    return path.parent.parent, int(named[1])


def element(hint: Any) -> tuple[Any, bool]:
    """Return the type of a single value of an option, and whether it takes several."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False


def convert(value: Any, hint: Any, where: str) -> Any:
    """Convert ``value``, from the command line or YAML, to the type ``hint`` of a field.

    Raises:
        OptionError: The value has another type, is not among the choices, or has the wrong number
            of elements. ``where`` names the option in the message.
    """
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional and (value is None or value in ("none", "null")):
        return None
    kind, many = element(hint)
    if not many:
        return _convert_one(value, kind, where)
    if not isinstance(value, list | tuple):
        raise OptionError(f"{where}: expected a list, found {shortened(repr(value))}")
    arity = get_args(hint)
    if arity[-1] is not Ellipsis and len(value) != len(arity):
        raise OptionError(f"{where}: expected {len(arity)} values, found {len(value)}")
    return tuple(_convert_one(part, kind, where) for part in value)


def check_limits(value: Any, least: float | None, most: float | None, flag: str) -> None:
    """Refuse a number beyond the limits of an option; None and words in its place have none.

    Raises:
        OptionError: The number is smaller than ``least`` or larger than ``most``, or no number.
    """
    if value is None or (least is None and most is None):
        return
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:  # a word that the option allows, or that its reader refuses
        return
    if least is not None and not number >= least:
        raise OptionError(f"{flag}: expected {least:,} or more, found {shortened(str(value))}")
    if most is not None and not number <= most:
        raise OptionError(f"{flag}: expected at most {most:,}, found {shortened(str(value))}")


def _convert_one(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is Literal:
        # YAML reads a bare `none` as text but `no` as False, so the text is compared.
        if value not in get_args(kind):
            choices = get_args(kind)
            raise OptionError(
                f"{where}: expected one of {', '.join(map(str, choices))}; "
                f"found {shortened(repr(value))}" + did_you_mean(str(value), choices)
            )
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise OptionError(f"{where}: expected true or false, found {shortened(repr(value))}")
        return value
    refused = OptionError(f"{where}: expected {kind.__name__}, found {shortened(repr(value))}")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise refused
    try:
        if kind is int and isinstance(value, float):
            raise ValueError
        converted = kind(value)
        if kind is float and not math.isfinite(converted):
            raise ValueError
        if kind is str:
            converted.encode()
        return converted
    except (ValueError, OverflowError) as error:
        raise refused from error


def launched_precision(asked: Literal["auto", Precision]) -> Literal["auto", Precision]:
    """Return the precision of ``--precision``, or for "auto" that of ``accelerate launch``.

    Its "no" says nothing, since that is what it sets where nobody asked for a precision. Its "bf16"
    is autocast over float32 parameters, as here.

    Args:
        asked: The value of ``--precision``.

    Raises:
        OptionError: It is another than that of ``accelerate launch``, or that is none of these.
    """
    launched = os.environ.get(_MIXED_PRECISION, "no")
    if launched == "no":
        return asked
    if launched != "bf16":
        raise OptionError(
            f"{_MIXED_PRECISION}={launched}: expected no or bf16, the only mixed precision here; "
            "start with accelerate launch --mixed_precision no, and choose by --precision"
        )
    if asked not in ("auto", "bf16"):
        raise OptionError(
            f"--precision {asked} and {_MIXED_PRECISION}=bf16 (accelerate launch "
            "--mixed_precision) contradict each other; leave out one of them"
        )
    return "bf16"
