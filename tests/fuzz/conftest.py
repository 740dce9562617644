"""Memory is limited while readers are fuzzed; the extended run writes what it tried."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.fuzz import trial


@pytest.fixture(autouse=True, scope="package")
def _limited():
    # The disk is not on trial: thousands of files are written and read back.
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda handle: None)
    if not sys.platform.startswith("linux"):
        yield
    else:
        with trial.limited_memory():
            yield
    patch.undo()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write ``results/fuzz.json`` where FUZZ_OUTPUT names it and everything passed."""
    output = os.environ.get("FUZZ_OUTPUT")
    if output and exitstatus == 0:
        content = {"examples": trial.EXAMPLES, "rows": trial.rows()}
        Path(output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
