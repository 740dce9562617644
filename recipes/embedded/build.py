"""Write the embedded data set as the JSONL and PNG files that a user would provide.

- ``train.jsonl``: step labels of mixed quality. Only evaluation reads the fields ``source`` (who
  judged) and ``wrong_labels`` (how many labels are wrong).
- ``cold-start.jsonl``: other rows from the same sources.
- ``clean.jsonl``: ``train.jsonl`` without the bad sources.
- ``meta.jsonl``: outcomes only, with equal numbers of right and wrong answers.
- ``dev.jsonl`` and ``test.jsonl``: eight candidates per question, with the true step labels for
  step metrics.
- ``sheets/*.png``: the pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recipes.embedded.questions import FAMILIES, Question, Step, answer, draw_question
from recipes.embedded.sheets import SPLITS, Scans, draw_sheet, load_scans, renamed
from recipes.embedded.sources import SOURCES, Mixture, judge, true_labels
from recipes.embedded.student import Attempt, Difficulty, attempt, draw_difficulty
from recipes.run.files import complete_directory


@dataclass(frozen=True)
class Sizes:
    """The number of questions of each file, and of solutions per question."""

    train_questions: int = 640
    train_solutions: int = 1  # More pictures teach more than more solutions.
    cold_questions: int = 160
    meta_questions: int = 40
    meta_solutions: int = 4
    dev_questions: int = 150
    test_questions: int = 400
    candidates: int = 8


def build(
    directory: Path, *, seed: int = 0, sizes: Sizes = Sizes(), mixture: Mixture = Mixture()
) -> dict[str, int]:
    """Write all files into ``directory``; return the number of rows of each.

    The data depend on nothing but the arguments. The directory appears under its name only when it
    is complete.

    Args:
        directory: The folder to write, which must not exist.
        seed: The seed of all random numbers.
        sizes: The numbers of questions and solutions.
        mixture: The label sources of the training set.

    Raises:
        FileExistsError: ``directory`` exists already.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists; remove it or choose another --out")
    with complete_directory(directory) as unfinished:
        rows = _write_files(unfinished, seed, sizes, mixture)
    return {name: len(content) for name, content in rows.items()}


def _write_files(
    directory: Path, seed: int, sizes: Sizes, mixture: Mixture
) -> dict[str, list[dict[str, Any]]]:
    """Write sheets and rows into an empty directory; return the rows of every file."""
    (directory / "sheets").mkdir()
    scans = load_scans()
    rows: dict[str, list[dict[str, Any]]] = {
        **_noisy_rows(directory, scans["train"], sizes, mixture, seed),
        "meta": list(_meta_rows(directory, scans["meta"], sizes, seed)),
    }
    for split, questions in (("dev", sizes.dev_questions), ("test", sizes.test_questions)):
        rows[split] = list(
            _candidate_rows(directory, split, scans[split], questions, sizes.candidates, seed)
        )
    rows["clean"] = [row for row in rows["train"] if row["source"] == "verified"]
    for name, content in rows.items():
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    return rows


def _rng(seed: int, split: str) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split)])


def _write_sheet(
    directory: Path, name: str, question: Question, scans: Scans, rng: np.random.Generator
) -> str:
    """Write the sheet on which the right convention, rows from the bottom, reads the values."""
    path = f"sheets/{name}.png"
    Image.fromarray(draw_sheet(renamed(question.values), scans, rng)).save(directory / path)
    return path


def _row(
    name: str,
    question: Question,
    image: str,
    steps: Sequence[Step],
    labels: Sequence[bool] | None,
    **more: Any,
) -> dict[str, Any]:
    return {
        "id": name,
        "question": question.text,
        "images": [image],
        "steps": [
            {"text": step.text, "label": None if labels is None else "+" if labels[i] else "-"}
            for i, step in enumerate(steps)
        ],
        **more,
    }


def _noisy_rows(
    directory: Path, scans: Scans, sizes: Sizes, mixture: Mixture, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of ``train`` and ``cold-start``, two draws from the same sources.

    They are disjoint, because a model that has memorised the labels of a row in the cold start
    tells less about their quality afterwards.
    """
    rng = _rng(seed, "train")
    return {
        name: list(_labelled_rows(directory, name, count, scans, sizes, mixture, rng))
        for name, count in (
            ("train", sizes.train_questions),
            ("cold-start", sizes.cold_questions),
        )
    }


def _labelled_rows(
    directory: Path,
    split: str,
    questions: int,
    scans: Scans,
    sizes: Sizes,
    mixture: Mixture,
    rng: np.random.Generator,
) -> Iterator[dict[str, Any]]:
    # Exact shares of the sources, in random order, reduce the variance between seeds.
    ends = np.round(np.cumsum(mixture.shares()) * questions).astype(int)
    sources = np.repeat(SOURCES, np.diff(ends, prepend=0))
    rng.shuffle(sources)
    for number, source in enumerate(map(str, sources)):
        question = draw_question(rng, FAMILIES[number % len(FAMILIES)])
        image = _write_sheet(directory, f"{split}-{number:04d}", question, scans, rng)
        difficulty = draw_difficulty(question, rng)
        for solution in range(sizes.train_solutions):
            found = attempt(question, difficulty, rng)
            labels = judge(source, question, found, mixture, rng)
            truth = true_labels(found.steps)
            yield _row(
                f"{split}-{number:04d}-{solution}",
                question,
                image,
                found.steps,
                labels,
                domain=question.family,
                group=f"{split}-{number:04d}",
                source=source,
                wrong_labels=sum(a != b for a, b in zip(labels, truth, strict=True)),
            )


def _solutions(
    question: Question, difficulty: Difficulty, count: int, rng: np.random.Generator
) -> list[Attempt]:
    return [attempt(question, difficulty, rng) for _ in range(count)]


def _meta_rows(directory: Path, scans: Scans, sizes: Sizes, seed: int) -> Iterator[dict[str, Any]]:
    """Yield as many right as wrong solutions of every question."""
    rng = _rng(seed, "meta")
    wanted = sizes.meta_solutions // 2
    for number in range(sizes.meta_questions):
        while True:
            question = draw_question(rng, FAMILIES[number % len(FAMILIES)])
            solutions = _solutions(question, draw_difficulty(question, rng), 24, rng)
            right = [s for s in solutions if s.answer == answer(question)][:wanted]
            wrong = [s for s in solutions if s.answer != answer(question)][:wanted]
            if len(right) == len(wrong) == wanted:
                break
        image = _write_sheet(directory, f"meta-{number:04d}", question, scans, rng)
        for index, found in enumerate(right + wrong):
            yield _row(
                f"meta-{number:04d}-{index}",
                question,
                image,
                found.steps,
                None,
                domain=question.family,
                answer=str(found.answer),
                correct=found.answer == answer(question),
                group=f"meta-{number:04d}",
            )


def _candidate_rows(
    directory: Path, split: str, scans: Scans, questions: int, candidates: int, seed: int
) -> Iterator[dict[str, Any]]:
    rng = _rng(seed, split)
    for number in range(questions):
        question = draw_question(rng, FAMILIES[number % len(FAMILIES)])
        image = _write_sheet(directory, f"{split}-{number:04d}", question, scans, rng)
        difficulty = draw_difficulty(question, rng)
        for index, found in enumerate(_solutions(question, difficulty, candidates, rng)):
            yield _row(
                f"{split}-{number:04d}-{index}",
                question,
                image,
                found.steps,
                true_labels(found.steps),
                domain=question.family,
                answer=str(found.answer),
                correct=found.answer == answer(question),
                group=f"{split}-{number:04d}",
            )
