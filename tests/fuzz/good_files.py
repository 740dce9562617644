"""Good files of every kind but examples, to be damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from recipes.options.parse import train_options
from tests.prm.tiny import save_image
from weighting import Clip, InstanceNet, InstanceTable, save_weighting

SCORES = [
    {"id": f"a{k}", "group": "g", "answer": "4", "correct": True, "step_scores": [0.5, 0.25],
     "scores": {"mean": 0.375, "min": 0.25}}
    for k in range(2)
]  # fmt: skip
WEIGHTS = [{"id": f"a{k}", "weight": 0.5, "raw_weight": None, "visits": 3} for k in range(2)]
TRAIN = {
    "train_file": "train.jsonl", "output_dir": "out", "steps": 3, "lower_lr": 1e-3,
    "lower_betas": [0.9, 0.98], "weighting": "table", "freeze": ["vision_tower"], "resume": None,
}  # fmt: skip
PLAIN = train_options(train_file="train.jsonl", output_dir="out")
YAML = (
    *("{}", "[]", "a", "1", "~", ".nan", ".inf", "-.inf", "2024-13-45", "2024-01-01", "0x", "0b"),
    *("1_000", "1:30", "!!int ''", "!!bool x", "!!float a", "!!binary a", "!!timestamp 1-1-1"),
    *("!!python/object/apply:os.abort []", "!!python/name:os.abort", "!!set {a, b}", "!!str 1"),
    *("&a [*a]", "*a", "&a {x: *a}", "<<: *a", "<<: {steps: 4}", "? [1]", "{1: 2", "'", '"', "|"),
    *(
        "[" * 3_000,
        "- " * 2_000,
        "{a: " * 2_000,
        "%YAML 9.9",
        "--- a\n--- b",
        "\t",
        "\x07",
        "@",
        "!",
    ),
    *("yes", "no", "on", "null", "none", "1e3", "1e400", "9" * 5_000, "9" * 400, "-1", "0.5"),
)


def weightings(store: Path) -> list[dict[str, bytes]]:
    """The files of a saved table and of a saved net."""

    def table(weighting: Any, ids: list[str]) -> dict[str, bytes]:
        save_weighting(store, weighting, weighting.init(), ids, {"features": ["label"]})
        return {path.name: path.read_bytes() for path in store.iterdir()}

    return [table(InstanceTable(2, bound=Clip()), ["a", "b"]), table(InstanceNet(3), [])]


def pictures(folder: Path) -> list[bytes]:
    """Small files of every format, with and without metadata."""
    kinds = ("png", "jpg", "gif", "bmp", "webp", "tiff")
    whole = [save_image(folder / f"whole.{kind}", 24, 16).read_bytes() for kind in kinds]
    exif = Image.Exif()
    exif[274], exif[305] = 6, "x" * 50
    for kind in ("png", "jpg", "webp", "tiff"):
        Image.new("RGB", (24, 16)).save(folder / f"turned.{kind}", exif=exif)
        whole.append((folder / f"turned.{kind}").read_bytes())
    return whole
