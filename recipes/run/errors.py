"""Errors that end a run early. Their messages say what was saved and how to resume."""

from __future__ import annotations


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
