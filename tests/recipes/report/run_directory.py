"""Run directories as ``train`` leaves them, written by hand: no model is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from recipes.run.provenance import fingerprint

HOSTILE = "<script>alert(1)</script>"
LABELS = tuple({"id": f"e{n}", "given": [1.0, 0.0], "learned": [n / 8, 0.125]} for n in range(6))
"""A ``labels.jsonl`` that turns over the first steps of ``e0`` to ``e3``."""
WEIGHTS = (1.5, 0.5, 2.0, 1.25, 0.25, 0.5)
SOURCES = ("judge", "crowd", "judge", "judge", "crowd", HOSTILE)


def write_data(folder: Path) -> Path:
    """Six examples with a picture, in the project's own format, spaced as no writer here does."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 4), (255, 0, 0)).save(folder / "a.png")
    rows = [
        {
            "id": f"e{n}",
            "question": f"{HOSTILE} what is {n} & $x$?",
            "images": ["a.png"],
            "steps": [{"text": f"step {HOSTILE}", "label": "+"}, {"text": "so", "label": "-"}],
            "domain": ("sum", "gap")[n % 2],
            "source": source,
        }
        for n, source in enumerate(SOURCES)
    ]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row).replace('": ', '" :  ') + " \r\n" for row in rows))
    return path


def write_run(folder: Path, data: Path, **changes: Any) -> Path:
    """A complete run on the data of ``write_data``; a file whose change is None is not written."""
    folder.mkdir(parents=True)
    weights = [
        {"id": f"e{n}", "weight": w, "raw_weight": None, "visits": n, "initial_loss": 1 - w / 4}
        for n, w in enumerate(WEIGHTS)
    ]
    log = [
        {"phase": "instance_net", "step": n, "lower_loss": 1 / n, "weights/min": 1 - n / 10,
         "weights/max": 1 + n / 10, "weights/ess": 0.9, "upper_loss": None if n == 2 else 0.3,
         "troubles": {"weights_at_bound": 1}}
        for n in range(1, 5)
    ]  # fmt: skip
    results = {
        "rows": {"pass@1": 0.25, "instance_net": 0.5, "pass@4": 1.0},
        "ci95": {"pass@1": [0.1, 0.4], "instance_net": [0.25, 0.75], "pass@4": [1.0, 1.0]},
        "n_questions": 8,
        "step_auc": 0.75,
        "step_macro_f1": None,
        "best_of_k": [0.25, 0.5],
        "pass_at_k": [0.25, 1.0],
        "troubles": {"weights_at_bound": 4},
        "signs": {"drift": f"a sign {HOSTILE}"},
        "seconds": {"set_up": 1.0, "train": 2.0},
        "weight_auc": 0.75,
    }
    scores = [{"id": "e2", "step_scores": [0.25, 0.125], "initial_scores": [0.5, 0.75]}]
    files: dict[str, Any] = {
        "args.yaml": {"weighting": "net", "train_file": str(data), "steps": 4, "seed": 3},
        "env.json": {"data": {"train_file": fingerprint(data)}},
        "weights.jsonl": weights,
        "log.jsonl": log,
        "results.json": results,
        "extreme_weights.jsonl": scores,
    }
    for name, content in (files | changes).items():
        if content is None:
            continue
        text = json.dumps(content)
        if name.endswith("l") and name != "args.yaml":
            text = "".join(json.dumps(line) + "\n" for line in content)
        (folder / name).write_text(yaml.safe_dump(content) if name == "args.yaml" else text)
    return folder
