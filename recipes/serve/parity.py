"""``bilevel-prm parity``: the step scores of a running server beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from prm.data.reader import read_examples
from prm.inputs.collate import EncodedExample
from prm.scoring import score_examples
from recipes.models.loading import load_model, placement_of, set_up
from recipes.options.values import OptionError, existing_file
from recipes.serve.options import ParityOptions
from recipes.serve.remote import (
    MOST_LIKELY,
    Ask,
    Between,
    Remote,
    by_bilevel_prm,
    by_chat,
    by_generative_scoring,
    by_sglang,
)
from recipes.serve.server import token_of
from recipes.terminal import progress_bar, say

APIS: Mapping[str, Ask] = {
    "vllm": by_generative_scoring,
    "vllm-chat": by_chat,
    "sglang": by_sglang,
    "bilevel-prm": by_bilevel_prm,
}
_OF_TEXT = ("vllm", "sglang")


@dataclass(frozen=True)
class Difference:
    """How far a step score of a server is from ours.

    Attributes:
        example: The id of the solution.
        step: The step, counted from 1.
        ours: Our score.
        theirs: The server's.
    """

    example: str
    step: int
    ours: float
    theirs: Between

    @property
    def size(self) -> float:
        """The distance of our score from the server's, or from what it may be."""
        return max(self.theirs.low - self.ours, self.ours - self.theirs.high, 0.0)

    @property
    def is_bound(self) -> bool:
        """Whether the server tells the bounds of its score alone."""
        return self.theirs.low < self.theirs.high


def run_parity(options: ParityOptions) -> int:
    """Print the largest difference, and return 0 if it is at most ``--tolerance``, else 1.

    Raises:
        OptionError: The model or the file cannot be used, or the server cannot be asked so.
        DataError: A record cannot be used.
        RunError: The server cannot be reached or gives no such scores.
    """
    if not options.server.startswith(("http://", "https://")):
        raise OptionError(f"--server {options.server}: expected http://... or https://...")
    set_up(options)
    prm, params = load_model(options, placement=placement_of(options.placement))
    usage = prm.usage
    if options.api == "vllm-chat" and usage.context != "plus":
        raise OptionError(
            f"--api vllm-chat: the slots of a conversation hold '+', and this model was trained "
            f"with {usage.context!r} in them; use --api vllm"
        )
    collator = prm.collator()
    examples = read_examples(
        existing_file(options.file),
        options.image_root,
        allow_outside_images=options.allow_outside_images,
    )
    rows = [collator.encode(example) for example in examples[: options.limit]]
    _check_pictures(options.api, rows)
    ours = score_examples(
        prm,
        params,
        rows,
        collator,
        options.eval_batch_size,
        full_vocab=usage.probability == "vocabulary",
        tokens_per_batch=options.tokens_per_batch,
    )
    remote = Remote(
        options.server,
        options.served_model or options.model,
        token_of(options.token),
        options.timeout,
    )
    theirs = []
    with progress_bar("asking", len(rows)) as bar:
        for row in rows:
            theirs.append(APIS[options.api](remote, row, usage))
            bar.update()
    found = differences(rows, ours, theirs)
    say(f"{options.server} ({options.api}): {summary(found)}; tolerance {options.tolerance:g}")
    return int(max(one.size for one in found) > options.tolerance)


def _check_pictures(api: str, rows: Sequence[EncodedExample]) -> None:
    shown = next((row.example.id for row in rows if row.example.images), None)
    if api in _OF_TEXT and shown is not None:
        raise OptionError(
            f"--api {api}: asks with token ids alone, and solution {shown!r} has pictures; use "
            "--api vllm-chat"
        )


def differences(
    rows: Sequence[EncodedExample], ours: Sequence[Tensor], theirs: Sequence[Sequence[Between]]
) -> list[Difference]:
    """Return the difference of every step of all solutions."""
    return [
        Difference(row.example.id, step, score, there)
        for row, own, other in zip(rows, ours, theirs, strict=True)
        for step, (score, there) in enumerate(zip(own.tolist(), other, strict=True), start=1)
    ]


def summary(found: Sequence[Difference]) -> str:
    """Return in one line how far the scores differ."""
    largest = max(found, key=lambda one: one.size)
    solutions = len({one.example for one in found})
    low, high = largest.theirs
    there = f"{low:.6f}" if low == high else f"at least {low:.6f}"
    bounds = sum(one.is_bound for one in found)
    return (
        f"{len(found)} steps of {solutions} solutions, largest difference {largest.size:.3g} "
        f"(solution {largest.example!r}, step {largest.step}: ours {largest.ours:.6f}, theirs "
        f"{there}), mean {sum(one.size for one in found) / len(found):.3g}"
        + (
            f"; of {bounds} steps a bound alone is known, '-' is not among the {MOST_LIKELY} "
            "likeliest tokens"
            if bounds
            else ""
        )
    )
