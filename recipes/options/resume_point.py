"""What ``--resume`` names: a run directory, or one checkpoint in it. Does not import torch."""

from __future__ import annotations

import re
from pathlib import Path


def resume_point(resume: str) -> tuple[Path, int | None]:
    """The run directory, and the step of the named checkpoint; None: the newest.

    ``runs/x`` is a run, ``runs/x/checkpoints/step-40`` a checkpoint of it.
    """
    path = Path(resume)
    named = re.fullmatch(r"step-(\d+)", path.name)
    if named is None or path.parent.name != "checkpoints":
        return path, None
    return path.parent.parent, int(named[1])
