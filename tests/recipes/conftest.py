from __future__ import annotations

from tests.tiny_task import task

__all__ = ["task"]
