"""A trained reward model that other programs call: questions and solutions in, step scores out.

    scorer = Scorer.from_pretrained("runs/net/model")
    scores = scorer.score([question, question], [solution, other_solution])

How the model is asked its folder says (``prm.conventions``), so that the scores are those of
``bilevel-prm score``, bit for bit.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

import torch
from PIL import Image

from prm.aggregations import AGGREGATIONS
from prm.conventions import FILE, Conventions
from prm.data.record_fields import Location, Words
from prm.data.splitter import solution_steps
from prm.data_urls import embedded
from prm.evaluation.select import best_candidate
from prm.inputs.collate import Collator, EncodedExample
from prm.inputs.image_inputs import image_inputs
from prm.models.model import PRM
from prm.names import Attention, DrawRule, Precision, TooLong
from prm.placement import resolve
from prm.schema import DataError, Step, StepExample
from prm.scoring import WINDOW, aggregate, score_examples

Solution = str | Sequence[str]
"""A solution: its text, which ``prm.solution_steps`` splits, or its steps."""

Picture = str | Path | bytes | Image.Image | Mapping[str, Any]
"""A picture: a path, a ``data:`` URL, the bytes of a file, a Pillow image, or an object
``{"bytes": ..., "path": ...}`` of Hugging Face data sets. Nothing is fetched from the network."""

Pictures = Picture | Sequence[Picture] | None
"""The pictures of a question."""

_PRECISIONS: Mapping[Any, Literal["auto", Precision]] = {
    "auto": "auto",
    **{name: name for name in get_args(Precision)},
    torch.float32: "float32",
    torch.bfloat16: "bf16-pure",
}
_MODES: Mapping[str, str] = {
    **{mode: mode for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    **dict.fromkeys(("CMYK", "HSV", "LAB", "RGBX", "YCbCr"), "RGB"),
    **dict.fromkeys(("La", "PA", "RGBa"), "RGBA"),
}
"""The Pillow mode in which a picture is written as PNG, without loss where there is one."""


@dataclass(frozen=True)
class Judgement:
    """What a reward model says of a solution.

    Attributes:
        step_scores: The probability of "+" at every step that was judged.
        score: The score of the solution, by the aggregation of the model's conventions.
        steps: The number of steps of the solution. There are more than step scores if it is longer
            than the model's context and was cut.
    """

    step_scores: tuple[float, ...]
    score: float
    steps: int

    @property
    def is_truncated(self) -> bool:
        """Whether the first steps alone were judged."""
        return len(self.step_scores) < self.steps


class Scorer:
    """Scores solutions with a reward model that says how it is asked.

    Threads may share one: they take turns.

    Args:
        prm: The model, with conventions.
        batch_size: The largest number of solutions per forward pass.
        tokens_per_batch: The largest number of tokens per forward pass; see
            ``prm.scoring.score_part``.
        too_long: What a solution that is longer than the model's context leads to: an error, or
            that its first steps, as many as fit, are judged.

    Raises:
        ValueError: The model has no conventions, or a number is less than 1.
    """

    def __init__(
        self,
        prm: PRM,
        *,
        batch_size: int = 64,
        tokens_per_batch: int = 2**16,
        too_long: TooLong = "refuse",
    ) -> None:
        if prm.conventions is None:
            raise ValueError(
                f"expected a model that says how it is asked, found none beside it ({FILE}); "
                "models of `bilevel-prm train` have it. Of another model, set it with "
                "dataclasses.replace(prm, conventions=prm.Conventions(...)) and save_prm"
            )
        for name, value in (("batch_size", batch_size), ("tokens_per_batch", tokens_per_batch)):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, found {value}")
        self.prm = prm
        self.batch_size = batch_size
        self.tokens_per_batch = tokens_per_batch
        self._collator = prm.collator(too_long=too_long)
        self._lock = Lock()

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        device: str = "auto",
        dtype: Literal["auto"] | Precision | torch.dtype = "auto",
        attention: Attention = "auto",
        batch_size: int = 64,
        tokens_per_batch: int = 2**16,
        too_long: TooLong = "refuse",
    ) -> Scorer:
        """Load a model from its folder, or by its name on a hub.

        Args:
            path_or_name: The folder, such as ``runs/net/model``.
            device: As the option ``--device``: "cpu", "cuda", "cuda:N", "mps", or "auto": the first
                CUDA device, else the CPU.
            dtype: As the option ``--precision``: "float32", "bf16", "bf16-pure" or "auto";
                ``torch.float32`` and ``torch.bfloat16`` are "float32" and "bf16-pure".
            attention: As the option ``--attention``.
            batch_size: As in the class.
            tokens_per_batch: As in the class.
            too_long: As in the class.

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: The model cannot be used (``prm.load_prm``) or does not say how it is asked,
                or the device cannot compute so.
        """
        precision = _PRECISIONS.get(dtype)
        if precision is None:
            names = [name for name in _PRECISIONS if isinstance(name, str)]
            raise ValueError(
                f"dtype {dtype}: expected {', '.join(names)}, torch.float32 or torch.bfloat16"
            )
        placement = resolve(device, precision, attention)
        return cls(
            placement.load(path_or_name),
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            too_long=too_long,
        )

    @property
    def conventions(self) -> Conventions:
        """How the model is asked, and how its scores are used."""
        return self.prm.usage

    def score(
        self,
        questions: Sequence[str],
        solutions: Sequence[Solution],
        images: Sequence[Pictures] | None = None,
    ) -> list[list[float]]:
        """Return the step scores p("+") of every solution.

        Args:
            questions: The question of every solution.
            solutions: The solutions, as texts or as lists of steps.
            images: The pictures of every solution's question. None means that there are none.

        Raises:
            DataError: A solution cannot be judged; the error names it (``solutions[3]``).
            ValueError: The lists differ in length.
        """
        judged = all_judged(self.judge(questions, solutions, images))
        return [list(one.step_scores) for one in judged]

    def judge(
        self,
        questions: Sequence[str],
        solutions: Sequence[Solution],
        images: Sequence[Pictures] | None = None,
    ) -> list[Judgement | DataError]:
        """Return what the model says of every solution, or why it cannot be judged.

        Args:
            questions: The question of every solution.
            solutions: The solutions, as texts or as lists of steps.
            images: The pictures of every solution's question. None means that there are none.

        Raises:
            DataError: A picture cannot be decoded, or a score is no number.
            ValueError: The lists differ in length.
        """
        _check_lists(questions, solutions, images)
        pictures = [None] * len(solutions) if images is None else images
        results: list[Judgement | DataError] = []
        examples: dict[int, StepExample] = {}
        for row, parts in enumerate(zip(questions, solutions, pictures, strict=True)):
            example = _example(f"solutions[{row}]", *parts)
            if isinstance(example, StepExample):
                examples[row] = example
            results.append(_UNJUDGED if isinstance(example, StepExample) else example)
        with self._lock:
            collator = self._fresh_collator()
            encoded: dict[int, EncodedExample] = {}
            for row, found in zip(examples, collator.encode_many(examples.values()), strict=True):
                if isinstance(found, DataError):
                    results[row] = found
                else:
                    encoded[row] = found
            scores = self._scores(list(encoded.values()), collator)
        how = AGGREGATIONS[self.conventions.aggregation]
        for row, steps in zip(encoded, scores, strict=True):
            whole = torch.ones_like(steps, dtype=torch.bool)
            results[row] = Judgement(
                tuple(steps.tolist()), float(aggregate(steps, whole, how)), len(examples[row].steps)
            )
        return results

    def rank(
        self, question: str, solutions: Sequence[Solution], images: Pictures = None
    ) -> list[int]:
        """Return the indices of the solutions of a question, the best first.

        Solutions of one score stand in the order in which they were given.

        Args:
            question: The question.
            solutions: The solutions, as texts or as lists of steps.
            images: The pictures of the question.

        Raises:
            DataError: A solution cannot be judged.
        """
        scores = self._solution_scores(question, solutions, images)
        return sorted(range(len(scores)), key=lambda index: -scores[index])

    def best_of_n(
        self,
        question: str,
        solutions: Sequence[Solution],
        images: Pictures = None,
        *,
        tie: DrawRule = "random",
        seed: int | str = 0,
    ) -> int:
        """Return the index of the best solution of a question.

        Args:
            question: The question.
            solutions: The solutions, as texts or as lists of steps.
            images: The pictures of the question.
            tie: Which of several best solutions is taken.
            seed: The seed of the draw among them.

        Raises:
            DataError: A solution cannot be judged.
            ValueError: There are no solutions.
        """
        scores = self._solution_scores(question, solutions, images)
        return best_candidate(scores, tie=tie, seed=seed)[0]

    def _solution_scores(
        self, question: str, solutions: Sequence[Solution], images: Pictures
    ) -> list[float]:
        count = len(solutions)
        judged = all_judged(self.judge([question] * count, solutions, [images] * count))
        return [one.score for one in judged]

    def _fresh_collator(self) -> Collator:
        """Return a collator that reads picture files anew, which may have changed since."""
        known = self._collator
        images = None
        if known.images is not None:
            most = self.conventions.max_patches
            images = image_inputs(self.prm.image_processor, max_patches=most)
        return Collator(known.prompt, images, token_types=known.token_types)

    def _scores(self, encoded: Sequence[EncodedExample], collator: Collator) -> list[torch.Tensor]:
        """Return step scores, [steps] each, in the batches of ``bilevel-prm score``."""
        window = WINDOW * self.batch_size
        scores: list[torch.Tensor] = []
        for start in range(0, len(encoded), window):
            scores += score_examples(
                self.prm,
                {},
                encoded[start : start + window],
                collator,
                self.batch_size,
                full_vocab=self.conventions.probability == "vocabulary",
                tokens_per_batch=self.tokens_per_batch,
            )
        for row, steps in zip(encoded, scores, strict=True):
            if not steps.isfinite().all():
                raise DataError(
                    expected="numbers as step scores",
                    found=f"{steps.tolist()}",
                    example=row.example.id,
                    remedy="the model's parameters are not finite, or overflow in use",
                )
        return scores


def all_judged(found: Sequence[Judgement | DataError]) -> list[Judgement]:
    """Return the judgements of ``Scorer.judge``, all of them.

    Raises:
        DataError: A solution cannot be judged: the first such error.
    """
    judgements = []
    for one in found:
        if isinstance(one, DataError):
            raise one
        judgements.append(one)
    return judgements


_UNJUDGED = DataError(expected="a judgement", found="none")


def _check_lists(questions: object, solutions: object, images: object) -> None:
    lists = {"questions": questions, "solutions": solutions}
    lists |= {} if images is None else {"images": images}
    sizes = {}
    for name, value in lists.items():
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise ValueError(
                f"expected a list of {name}, one entry for every solution, found "
                f"{type(value).__name__}"
            )
        sizes[name] = len(value)
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise ValueError(f"expected one entry for every solution in each list, found {found}")


def _example(
    name: str, question: str, solution: Solution, images: Pictures
) -> StepExample | DataError:
    """Return the example of a solution, or the error of one that cannot be one."""
    here = Location(Path())
    try:
        texts = solution_steps(solution) if isinstance(solution, str) else solution
        listed = here.listed(list(texts), "steps", "steps", "leave out a solution without steps")
        steps = [here.step(text, f"steps[{n}]") for n, text in enumerate(listed)]
        pictures = [
            _picture(picture, f"images[{n}]", here) for n, picture in enumerate(_listed(images))
        ]
        return StepExample(
            id=name,
            question=here.text(question, "question"),
            images=tuple(pictures),
            steps=tuple(map(Step, steps)),
        )
    except DataError as error:
        return error.copy(example=name)


def _listed(images: Pictures) -> Sequence[Picture]:
    if images is None:
        return ()
    if isinstance(images, str | Path | bytes | Image.Image | Mapping):
        return (images,)
    return images


def _picture(picture: Picture, field: str, here: Location) -> Path:
    """Return the path of a picture, or the one that stands for its bytes."""
    if isinstance(picture, bytes):
        return here.image({"bytes": picture}, field)
    if isinstance(picture, Image.Image):
        mode = _MODES.get(picture.mode)
        if mode is None:
            found = Words(f"mode {picture.mode!r}, whose range of values is not known")
            here.refuse(field, f"a Pillow image of a mode among {', '.join(_MODES)}", found)
        file = io.BytesIO()
        picture.convert(mode).save(file, "PNG", exif=picture.getexif())  # its orientation
        return embedded(file.getvalue())
    return here.image(str(picture) if isinstance(picture, Path) else picture, field)
