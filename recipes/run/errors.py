"""Errors that end a run early; their messages say what is kept and how to go on."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run that cannot go on; the message says where, why and what to try."""


class StepError(RunError):
    """A step that cannot be taken, or a batch that cannot be made."""


class NonFiniteError(StepError):
    """A loss, gradient, hypergradient, weight or parameter that is not a number, or explodes."""


class WriteError(RunError):
    """A file of the run directory that cannot be written: disk full, no permission, read-only."""


class Stopped(RunError):
    """The run was asked to stop (a signal), and did, after a complete step.

    Attributes:
        status: Exit status for the command: 128 + number of the signal, as shells count.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
