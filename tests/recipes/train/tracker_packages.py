"""Stand-ins of trackers: they have the signatures of the real ones, and note what they are sent.

Recorded from wandb 0.31.0 and trackio 0.43.0; ``test_trackers`` compares them where these are
installed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

INIT = {
    "wandb": (
        *("entity", "project", "dir", "id", "name", "notes", "tags", "config"),
        *("config_exclude_keys", "config_include_keys", "allow_val_change", "group", "job_type"),
        *("mode", "force", "reinit", "resume", "resume_from", "fork_from", "save_code"),
        *("tensorboard", "sync_tensorboard", "monitor_gym", "settings", "anonymous"),
    ),
    "trackio": (
        *("project", "name", "group", "space_id", "server_url", "dataset_id", "bucket_id"),
        *("config", "resume", "settings", "private", "embed", "auto_log_gpu", "gpu_log_interval"),
        *("auto_log_cpu", "cpu_log_interval", "webhook_url", "webhook_min_level"),
    ),
}
"""The parameters of ``init``, in their order."""


@dataclass
class Histogram:
    """``Histogram`` of both packages."""

    sequence: Any = None
    np_histogram: Any = None
    num_bins: int = 64


@dataclass
class Run:
    """What ``init`` was called with, and what was logged: (step, values) in order."""

    given: dict[str, Any]
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    metrics: dict[str, str | None] = field(default_factory=dict)
    ended: Any = None
    fails_from: int | None = None

    def note(self, step: int, values: dict[str, Any]) -> None:
        if self.fails_from is not None and step >= self.fails_from:
            raise ConnectionError("the server\nis gone")
        self.rows.append((step, values))


class WandbRun(Run):
    def log(self, data, step=None, commit=None) -> None:
        assert step is None
        assert commit is None
        values = dict(data)
        self.note(values.pop("train/global_step"), values)

    def define_metric(
        self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None
    ) -> None:
        self.metrics[name] = step_metric

    def finish(self, exit_code=None) -> None:
        self.ended = exit_code


class TrackioRun(Run):
    def log(self, metrics, step=None) -> None:
        self.note(step, dict(metrics))

    def finish(self) -> None:
        self.ended = "finished"


KINDS = {"wandb": WandbRun, "trackio": TrackioRun}


def stand_in(monkeypatch, name: str, **more: Any) -> list[Run]:
    """Put a stand-in of a package in its place; the runs that are opened are in the list."""
    module: Any = ModuleType(name)
    opened: list[Run] = []

    def init(**given: Any) -> Run:
        assert given.keys() <= {*INIT[name]}
        opened.append(KINDS[name](given, **more))
        return opened[-1]

    module.init, module.Histogram = init, Histogram
    monkeypatch.setitem(sys.modules, name, module)
    return opened
