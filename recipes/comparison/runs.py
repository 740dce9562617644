"""The run directories of one seed: its data sets, cold starts, and a run for each row.

What is complete is not repeated, and a run that was begun is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from prm.digests import check_digest, write_digest
from recipes.comparison.relabelled import write_nait
from recipes.comparison.rows import DATA, ROWS, Entries, GivenWeights, Row
from recipes.comparison.statistics import Values
from recipes.embedded.build import build
from recipes.options.parse import changed, resolve
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.run.files import write_text
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training

_EVAL_EVERY = 25  # lower steps

Options = TypeVar("Options", ColdStartOptions, TrainOptions)


@dataclass(frozen=True)
class Seed:
    """Where the data and runs of a seed are kept.

    Attributes:
        number: The seed.
        directory: The folder.
        threads: CPU threads of torch.
    """

    number: int
    directory: Path
    threads: int = 1

    def data(self, name: str) -> Path:
        """Return the folder of a data set of ``DATA``, which is written unless it is there."""
        directory = self.directory / name
        if not directory.exists():
            drawn = DATA[name]
            build(directory, seed=self.number, sizes=drawn.sizes, mixture=drawn.mixture)
        return directory

    @property
    def test_file(self) -> Path:
        """The test set of every row."""
        return self.data("data") / "test.jsonl"

    def cold_start(self, data: str) -> Path:
        """Return the run directory of the cold start on a data set."""
        directory = self.directory / "cold" / data
        if not (directory / "results.json").exists():
            options = changed(
                resolve(ColdStartOptions, {"config": "cold-start"}),
                train_file=str(self.data(data) / "cold-start.jsonl"),
                output_dir=str(directory),
                **self._common(),
            )
            once(options, run_cold_start)
        return directory

    def row(self, name: str, row: Row) -> Path:
        """Return the run directory of a row, with the model of its best step on the dev set."""
        directory = self.directory / "rows" / name
        if (directory / "results.json").exists():
            return directory
        options = resolve(TrainOptions, {"config": row.preset})
        more: dict[str, Any] = {"test_file": str(self.test_file)}
        if row.trains:
            dev = str(self.data("data") / "dev.jsonl")
            more |= {"dev_file": dev, "eval_every": _EVAL_EVERY, "keep_best": True}
        else:
            more["dev_file"] = None
        reads_meta = options.data.meta_file is not None or row.options.get("lower_data") == "meta"
        if reads_meta:
            more["meta_file"] = str(self._file(row.meta))
        if row.weights is not None:
            more["weights_file"] = str(self._weights(name, row.weights, row.train))
        start = None if row.start is None else str(self.cold_start(row.start) / "model")
        own = changed(
            options,
            train_file=str(self._train(row)),
            init_from=start,
            output_dir=str(directory),
            on_existing="refuse",
            **self._common(),
            **(more | dict(row.options)),
        )
        return once(own, run_training)

    def last(self, name: str) -> Path:
        """Return the run that has scored the test set with the last model of a row."""
        run = self.directory / "rows" / name
        if not (run / "last").is_dir():
            return run
        directory = run.with_name(f"{name}-last")
        if not (directory / "results.json").exists():
            kept = resolve(TrainOptions, {"config": str(run / "args.yaml")})
            once(
                changed(
                    resolve(TrainOptions, {"config": "baseline"}),
                    train_file=str(self._file("data/train")),
                    dev_file=None,
                    test_file=str(self.test_file),
                    init_from=str(run / "last" / "model"),
                    aggregation=kept.aggregation,
                    output_dir=str(directory),
                    on_existing="refuse",
                    steps=0,
                    **self._common(),
                ),
                run_training,
            )
        return directory

    def _common(self) -> dict[str, Any]:
        # On the CPU, whose figures are to be the same on every machine.
        return {"seed": self.number, "threads": self.threads, "device": "cpu", "progress": False}

    def _file(self, name: str) -> Path:
        data, _, file = name.partition("/")
        return self.data(data) / f"{file}.jsonl"

    def _train(self, row: Row) -> Path:
        """Return the training file of a row; a relabelled one stands beside the given one."""
        given = self._file(row.train)
        if row.relabel is None or row.start is None:
            return given
        file = given.with_name(f"{given.stem}-{row.relabel}.jsonl")
        if not file.exists():
            model = self.cold_start(row.start) / "model"
            write_nait(given, file, model, self.threads)
        return file

    def _weights(self, name: str, given: GivenWeights, train: str) -> Path:
        """Return the file of a row's fixed weights, made from what another row has learned."""
        learned = _weights_of(self.row(given.of, ROWS[given.of]))
        rows = [json.loads(line) for line in self._file(train).read_text().splitlines()]
        weights = given.rule(learned, rows, self.number)
        file = self.directory / "weights" / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        lines = [
            json.dumps({"id": entry["id"], "weight": weight})
            for entry, weight in zip(learned, weights, strict=True)
        ]
        write_text(file, "\n".join(lines) + "\n")
        write_digest(file)
        return file


def _weights_of(run: Path) -> Entries:
    check_digest(run / "weights.jsonl")
    return [json.loads(line) for line in (run / "weights.jsonl").read_text().splitlines()]


def once(options: Options, run: Callable[[Options], Path]) -> Path:
    """Run, or resume, unless the directory holds the complete run; return the directory."""
    directory = Path(options.output_dir)
    if not (directory / "results.json").exists():
        begun = (directory / "args.yaml").exists()
        run(changed(options, resume=str(directory)) if begun else options)
    return directory


def questions_of(run: Path, name: str) -> Values:
    """Return the per-question values of a run, with its own row under the given name.

    A question none of whose candidates has an answer has no vote, which is not right.
    """
    lines = (run / "test_questions.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    keys = dict.fromkeys(key for entry in entries for key in entry if key != "question")
    return {
        key if is_shared(key) else name: np.array([entry.get(key, 0.0) for entry in entries])
        for key in keys
    }


def is_shared(name: str) -> bool:
    """Whether a row does not depend on the model."""
    return name.startswith("pass@") or name == "self_consistency"


def results_of(run: Path) -> Mapping[str, Any]:
    """Return the ``results.json`` of a complete run."""
    found: Mapping[str, Any] = json.loads((run / "results.json").read_text())
    return found
