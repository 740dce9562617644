"""Errors that end a run early, and how a command reports errors: in one line.

The messages of the former say what was saved and how to resume.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from safetensors import SafetensorError

from prm.schema import DataError
from recipes.options.values import OptionError
from recipes.stopping import Interrupted, interrupting
from recipes.terminal import say


class RunError(RuntimeError):
    """A run cannot continue; the message says where, why and what to try."""


class StepError(RunError):
    """A step cannot be taken, or a batch cannot be prepared."""


class NonFiniteError(StepError):
    """A loss, gradient, hypergradient, weight or parameter is non-finite or explodes."""


class WriteError(RunError):
    """An output cannot be written: disk full, no permission, read-only."""


class Stopped(RunError):
    """A signal asked the run to stop, and it stopped after a complete step.

    Attributes:
        status: The exit status of the command: 128 + the number of the signal, as in shells.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def are_agreed(error: Exception) -> bool:
    """Return whether all ranks of a run raise an error, after the same step."""
    return isinstance(error, Stopped | NonFiniteError)


def left_apart(error: Exception) -> bool:
    """Return whether the other ranks do not know of an error, and cannot be told."""
    from bilevel.replicas import is_apart

    return is_apart(error) and not are_agreed(error)


def reported(title: str, command: Callable[[], int | None], *, saves: bool = False) -> int:
    """Run a command and return its exit status, 0 if it returns none.

    Errors of the user (options, data) and of the machine (files that cannot be read or written)
    end in one line that says what to change, without a traceback. Errors of the program keep their
    traceback. A signal interrupts the work, or ends the process while a module is imported.

    Args:
        title: The name of the command, in front of the line.
        command: The command.
        saves: Whether it saves while it works, and goes on from there.
    """

    def ended(why: object, status: int) -> int:
        say(f"{title}: {why}", error=True)
        return status

    try:
        with interrupting():
            return command() or 0
    except Stopped as error:
        return ended(error, error.status)
    except OptionError as error:
        return ended(error, 2)
    except (DataError, RunError, SafetensorError) as error:  # the last: of a full disk, for one
        return ended(error, 1)
    except OSError as error:
        return ended(reason(error), 1)
    except ModuleNotFoundError as error:
        if "bilevel-prm[" not in str(error):
            raise
        return ended(error, 1)
    except KeyboardInterrupt as error:
        print(file=sys.stderr)  # ends the line of the terminal's ^C, or of a progress bar
        kept = "; what was logged and saved so far is kept" if saves else ""
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        return ended(f"interrupted{kept}", 128 + number)


def reason(error: OSError) -> str:
    """Return path and reason of an error of the operating system, as one phrase."""
    if error.strerror is None:
        return str(error)
    path = error.filename if error.filename2 is None else error.filename2
    name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else path
    return error.strerror if name is None else f"{name}: {error.strerror}"
