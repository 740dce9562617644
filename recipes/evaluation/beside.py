"""Rows of an earlier comparison that were scored on the same test file as a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prm.digests import digest_file
from recipes.options.values import OptionError

SHOWN = ("base", "cold_start", "no_selection", "small_loss", "meta_only", "clean_oracle")
"""The rows that a run is looked at beside: where it starts, controls, and the ceiling."""


@dataclass(frozen=True)
class Beside:
    """Accuracies of one seed of a comparison.

    Attributes:
        source: The file and the seed.
        rows: The accuracy of each row's last model.
    """

    source: str
    rows: Mapping[str, float]


def rows_beside(path: str, test_file: str) -> Beside | None:
    """Return what a ``compare.json`` has on a test file; None if no seed of it had this one.

    Args:
        path: The file that ``bilevel-prm compare`` wrote.
        test_file: The test file of a run, which the seed's must equal to the byte.

    Raises:
        OptionError: ``path`` is missing, or is not such a file.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        seeds = list(report["test_sha256"])
        digests = report["test_sha256"]
        rows = {
            name: dict(zip(seeds, map(float, report["per_seed"][name]), strict=True))
            for name in SHOWN
            if name in report["per_seed"]
        }
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--compare-with {path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"--compare-with {path}: expected the compare.json of bilevel-prm compare, with "
            f"test_sha256 and per_seed; found {type(error).__name__}: {error}"
        ) from error
    digest = digest_file(test_file)
    for seed in seeds:
        if digests[seed] == digest:
            return Beside(f"{path}, seed {seed}", {name: row[seed] for name, row in rows.items()})
    return None
