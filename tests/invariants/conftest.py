from __future__ import annotations

from tests.invariants.families import setup
from tests.tiny_task import task

__all__ = ["setup", "task"]
