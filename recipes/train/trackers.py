"""Trackers that follow a run (``--report-to``): TensorBoard, trackio, Weights & Biases.

They get what ``log.jsonl`` says, read from the file itself after each of its lines, so that the two
cannot differ, and histograms of the weights. A name without a group gets that of its line:
``train/lower_loss``, ``dev/best_of_n``; ``weights/ess`` has its own.

A resumed run goes on in the same run of each tracker. ``trackers.json`` in the run directory holds
its id, and the last step that was sent of each kind of line. After an interruption

* lines of the log that were not sent yet are sent;
* points after the checkpoint, which a killed run may have sent already, come again, with the same
  bits. TensorBoard drops the earlier ones (``purge_step``); the others keep them, and get no line
  of a step again.

So no point is missing, and none is there twice, but that a kill between sending a line and noting
it lets trackio and Weights & Biases have this one line twice, with equal values.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from recipes.options.flat import flatten
from recipes.options.train import LowerOptions
from recipes.options.values import OptionError, shortened
from recipes.run.errors import RunError
from recipes.run.files import write_json
from recipes.run.resume import Run
from recipes.run.show import json_object
from recipes.train.dev_evaluation import PHASE

STATE = "trackers.json"
PROJECT = "bilevel-prm"
"""The project of trackio and Weights & Biases, if their environment variables name no other."""
BATCH_WEIGHTS, ALL_WEIGHTS = "weights/batch", "weights/all"
_BINS = 64

Values: TypeAlias = Mapping[str, float | NDArray[np.float64]]
"""Points of one step by name: numbers, and arrays of which the histogram is shown."""


class Tracker(Protocol):
    """A run of a tracker that is open."""

    def send(self, step: int, values: Values) -> None:
        """Add the points of a step; what was sent before is safe when this returns."""

    def close(self, failed: bool) -> None:
        """End the run, ``failed`` if the training ended with an error."""


@dataclass
class Tracking:
    """The trackers of a run, and how far each has followed the log.

    Attributes:
        directory: The run directory.
        trackers: The open trackers by name; one that fails is dropped.
        state: Of each tracker the id of its run and the last step sent of each kind of line.
    """

    directory: Path
    trackers: dict[str, Tracker] = field(default_factory=dict)
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    _read: int = 0

    def follow(self, step: int, weights: Tensor | None = None) -> None:
        """Send the lines that are new in the log.

        Args:
            step: The step of the newest.
            weights: The weights of that step's examples, [batch], if there are any.
        """
        self.histogram(step, BATCH_WEIGHTS, weights)

    def histogram(self, step: int, name: str, weights: Tensor | None) -> None:
        """Send the lines that are new in the log, and weights, of which the histogram is shown.

        Args:
            step: The number of lower steps so far.
            name: The name of the histogram.
            weights: The weights; None if there are none. Those that are not finite are left out.
        """
        if not self.trackers:
            return
        groups: list[tuple[str, int, Values]] = [
            (kind_of(entry), entry["step"], points(entry)) for entry in self._new_lines()
        ]
        if weights is not None:
            values = weights.detach().double().cpu().numpy()
            if np.isfinite(values).all():
                groups.append((name, step, {name: values}))
        for tracker in [*self.trackers]:
            self._try(tracker, partial(self._send, groups, self.state[tracker]["sent"]))

    def _send(
        self, groups: Sequence[tuple[str, int, Values]], sent: dict[str, int], tracker: Tracker
    ) -> None:
        """Send points, each with its kind and step, but for those that were sent already."""
        for kind, step, values in groups:
            if step > sent.get(kind, -1):
                tracker.send(step, values)
                sent[kind] = step
        write_json(self.directory / STATE, self.state)

    def close(self, *, failed: bool) -> None:
        """Send what is left, and end the runs of the trackers."""
        self.histogram(0, BATCH_WEIGHTS, None)
        for tracker in [*self.trackers]:
            self._try(tracker, lambda one: one.close(failed))
        self.trackers.clear()

    def _new_lines(self) -> list[dict[str, Any]]:
        """Return the entries of the log that were not returned yet."""
        log = self.directory / "log.jsonl"
        if not log.is_file():
            return []
        with log.open("rb") as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
        complete = [line for line in lines if line.endswith(b"\n")]
        self._read += sum(map(len, complete))
        return [json.loads(line) for line in complete]

    def _try(self, name: str, act: Callable[[Tracker], None]) -> None:
        """Act on a tracker; after an error, of whatever kind, the run goes on without it."""
        try:
            act(self.trackers[name])
        except Exception as error:
            del self.trackers[name]
            tqdm.write(
                f"warning: --report-to {name}: {_told(error)}; the run goes on without it. A "
                "resumed run sends what is missing",
                file=sys.stderr,
            )


def kind_of(entry: Mapping[str, Any]) -> str:
    """Return the group of a line of the log: "dev" of an evaluation, else "train"."""
    return "dev" if entry["phase"] == PHASE else "train"


def points(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of the log, by their names in trackers.

    A null, notes and the list of skipped steps are no numbers, and left out.
    """
    found: dict[str, float] = {}
    for name, value in entry.items():
        counts = value if isinstance(value, Mapping) else {}
        if name not in ("phase", "step") and type(value) in (int, float):
            found[name if "/" in name else f"{kind_of(entry)}/{name}"] = float(value)
        found |= {f"{name}/{part}": float(count) for part, count in counts.items()}
    return found


def check_trackers(names: Sequence[str]) -> None:
    """Find out before a run whether its trackers are installed.

    Raises:
        OptionError: One is named twice.
        ModuleNotFoundError: One is not installed; the message names the extra.
    """
    if len({*names}) < len(names):
        raise OptionError(f"--report-to {' '.join(names)}: a tracker is named twice")
    for name in names:
        try:
            import_module(_OPENED[name].module)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"--report-to {name}: {error.name} is not installed: "
                f"pip install 'bilevel-prm[{name}]'"
            ) from error


@contextmanager
def tracked(run: Run, options: LowerOptions) -> Iterator[Tracking]:
    """Open the trackers of a run, on rank 0, and close them behind the body.

    Raises:
        RunError: One cannot be started. No step is lost, since none was taken yet.
    """
    names = options.run.report_to if run.writes else ()
    tracking = Tracking(run.directory)
    if names:
        tracking.state = json_object(run.directory / STATE) or {}
    start = int(run.start.state.lower_steps)
    for name in names:
        opened = _OPENED[name]
        resumed = name in tracking.state
        own = tracking.state.setdefault(name, {"id": uuid.uuid4().hex[:12], "sent": {}})
        if opened.purges:
            own["sent"] = {kind: min(step, start) for kind, step in own["sent"].items()}
        try:
            tracking.trackers[name] = opened.open(
                run.directory, own["id"], flatten(options), start if resumed else None
            )
        except Exception as error:
            tracking.close(failed=True)
            raise RunError(
                f"--report-to {name}: cannot be started ({_told(error)}). Go on with: "
                f"{run.command}; or without trackers: {run.command} --report-to"
            ) from error
    failed = True
    try:
        tracking.follow(start)
        yield tracking
        failed = False
    finally:
        tracking.close(failed=failed)


def _told(error: Exception) -> str:
    return shortened(" ".join(f"{type(error).__name__}: {error}".split()))


class _TensorBoard:
    def __init__(self, directory: Path, id: str, config: Values, resumed: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = None if resumed is None else resumed + 1
        folder = str(directory / "tensorboard")
        self._writer: Any = SummaryWriter(folder, purge_step=purged)

    def send(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if isinstance(value, float):
                self._writer.add_scalar(name, value, step)
            else:
                self._writer.add_histogram(name, value, step)
        self._writer.flush()  # On the disk before the checkpoint, of which a resumed run goes on.

    def close(self, failed: bool) -> None:
        self._writer.close()


def _row(values: Values, histogram: Callable[..., Any]) -> dict[str, Any]:
    return {
        name: value
        if isinstance(value, float)
        else histogram(np_histogram=np.histogram(value, bins=_BINS))
        for name, value in values.items()
    }


class _Wandb:
    """Steps are an axis of its own: a row of the dev set has the step of the line before it."""

    STEP = "train/global_step"

    def __init__(self, directory: Path, id: str, config: Values, resumed: int | None) -> None:
        import wandb

        self._histogram = wandb.Histogram
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or directory.name,
            id=id,
            resume="allow",
            dir=str(directory),
            config=dict(config),
        )
        self._run.define_metric(self.STEP)
        self._run.define_metric("*", step_metric=self.STEP)

    def send(self, step: int, values: Values) -> None:
        self._run.log({**_row(values, self._histogram), self.STEP: step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, directory: Path, id: str, config: Values, resumed: int | None) -> None:
        import trackio

        self._histogram = trackio.Histogram
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=f"{directory.name}-{id}",
            resume="allow",
            config=dict(config),
        )

    def send(self, step: int, values: Values) -> None:
        self._run.log(_row(values, self._histogram), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


@dataclass(frozen=True)
class _Opened:
    """How a tracker is opened.

    Attributes:
        module: What its extra installs.
        open: From run directory, id, options and the step that a run of it goes on from (None: it
            is new) to the tracker.
        purges: Whether points after that step are dropped then.
    """

    module: str
    open: Callable[[Path, str, Mapping[str, Any], int | None], Tracker]
    purges: bool = False


_OPENED: Mapping[str, _Opened] = {
    "tensorboard": _Opened("tensorboard", _TensorBoard, purges=True),
    "trackio": _Opened("trackio", _Trackio),
    "wandb": _Opened("wandb", _Wandb),
}
