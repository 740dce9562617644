"""Draw sheets: 32 x 32 pictures of 2 x 2 cells, from real handwritten digit scans.

The scans are the 1,797 UCI digits that ship with scikit-learn (no download). They are split by
index, so that no scan of a test sheet occurs in pretraining, training, meta or dev data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

CELLS = ("A1", "A2", "B1", "B2")
"""The names of the cells in reading order: row letter and column number."""

FROM_BOTTOM = {"A1": "B1", "A2": "B2", "B1": "A1", "B2": "A2"}
"""The cell that a name means if rows are counted from the bottom, as on a chess board, by its name
from the top, as in a spreadsheet. It is its own inverse."""

CELL_PIXELS = 16
SHEET_PIXELS = 2 * CELL_PIXELS
SPLITS = ("base", "train", "meta", "dev", "test")
_SPLIT_SIZES = {"base": 847, "train": 350, "meta": 150, "dev": 150, "test": 300}
PICTURES = ("digits", "inverted", "dots")


@dataclass(frozen=True)
class Scans:
    """The scans of one split: ``images`` [n, 8, 8] in 0..255 and ``digits`` [n]."""

    images: np.ndarray
    digits: np.ndarray

    def of(self, digit: int, rng: np.random.Generator) -> np.ndarray:
        """Draw one scan of ``digit``, [8, 8]."""
        scan: np.ndarray = self.images[rng.choice(np.flatnonzero(self.digits == digit))]
        return scan


def load_scans() -> Mapping[str, Scans]:
    """Return all splits, each stratified by digit. The split of a scan depends on its index alone.

    Raises:
        ModuleNotFoundError: Scikit-learn, which contains the scans, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the embedded data set draws on the digit scans inside scikit-learn, which is not "
            "installed; install it with: pip install 'bilevel-prm[demo]'"
        ) from error
    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    # Deal the scans of each digit round-robin so that every split has its share of every digit.
    order = order[np.argsort(bunch.target[order], kind="stable")]
    total = sum(_SPLIT_SIZES.values())
    # Systematic sampling spreads each split evenly over the order by digit.
    ranks = np.concatenate(
        [(np.arange(size) + 0.5) / size * total for size in _SPLIT_SIZES.values()]
    )
    owner = np.concatenate([np.full(size, i) for i, size in enumerate(_SPLIT_SIZES.values())])
    owner = owner[np.argsort(ranks, kind="stable")]
    return {
        split: Scans(images[order[owner == i]], bunch.target[order[owner == i]])
        for i, split in enumerate(SPLITS)
    }


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by the names that the cells have if rows are counted from the other end."""
    return {cell: values[FROM_BOTTOM[cell]] for cell in CELLS}


def draw_sheet(
    values: Mapping[str, int], scans: Scans, rng: np.random.Generator, picture: str = "digits"
) -> np.ndarray:
    """Return a sheet [32, 32] uint8 that shows ``values[cell]`` in each of the four cells.

    ``picture`` is "digits" (bright ink on dark), "inverted" (dark ink on bright) or "dots" (the
    value as a number of dots).
    """
    sheet: np.ndarray = np.zeros((SHEET_PIXELS, SHEET_PIXELS), np.float32)
    for index, cell in enumerate(CELLS):
        row, column = divmod(index, 2)
        tile = (
            _dots(values[cell], rng)
            if picture == "dots"
            else _digit(scans.of(values[cell], rng), rng)
        )
        sheet[
            row * CELL_PIXELS : (row + 1) * CELL_PIXELS,
            column * CELL_PIXELS : (column + 1) * CELL_PIXELS,
        ] = tile
    sheet = sheet * rng.uniform(0.75, 1.0) + rng.normal(0, 6, sheet.shape)
    if picture == "inverted":
        sheet = 255 - sheet
    return np.clip(np.round(sheet), 0, 255).astype(np.uint8)


def _digit(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a cell with a scan, slightly rotated and resized, at a random position."""
    size = int(rng.integers(12, CELL_PIXELS + 1))
    image = Image.fromarray(scan).resize((size, size), Image.Resampling.BICUBIC)
    turned = image.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    tile: np.ndarray = np.zeros((CELL_PIXELS, CELL_PIXELS), np.float32)
    y, x = rng.integers(0, CELL_PIXELS - size + 1, 2)
    tile[y : y + size, x : x + size] = np.asarray(turned)
    return tile


def _dots(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return a cell with ``count`` (0..9) dots of 3 x 3 pixels on a 3 x 3 grid."""
    tile = np.zeros((CELL_PIXELS, CELL_PIXELS), np.float32)
    for cell in rng.permutation(9)[:count]:
        y, x = divmod(int(cell), 3)
        tile[2 + 5 * y : 5 + 5 * y - 1, 2 + 5 * x : 5 + 5 * x - 1] = 255
    return tile
