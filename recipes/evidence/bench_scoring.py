"""Scoring beside the loop of DreamPRM-1.5: speed and memory.

Run by ``python -m recipes.evidence.bench_scoring``.

The embedded model with InternVL3's vocabulary of 151,674 tokens and random parameters scores the
same candidates in five ways, in turns in one process:

- the original's loop: one solution at a time, logits of every token over the whole vocabulary,
  softmax over all of them, of which the values of "+" at the label positions are kept;
- one at a time, with the head at the label positions only (whole vocabulary);
- in batches of similar length, likewise (``--probability vocabulary``);
- in batches, with the head's rows of "+" and "-" only;
- so, with the candidates of a question as a tree of their tokens (the default).

Input is prepared alike and counted for all: text is tokenised once per solution, a picture cut into
tiles once. The first three compute the same numbers; how far they differ is reported.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prm.data.reader import read_jsonl
from prm.inputs.collate import Collator
from prm.models.model import PRM, make_prm
from prm.schema import StepExample
from prm.scoring import score_examples
from recipes.embedded.build import Sizes, build
from recipes.embedded.vocabulary import (
    SYSTEM_PROMPT,
    base_config,
    build_image_processor,
    build_tokenizer,
)
from recipes.evidence.bench.measure import Timed, in_rounds, median_of, with_peak
from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json
from recipes.run.provenance import environment, machine

VOCABULARY = 151_674
_ORIGINAL = "original loop"
_INPUTS = ("input_ids", "attention_mask", "pixel_values")


def wide_vocabulary_model() -> PRM:
    """Return the embedded architecture with InternVL3's vocabulary and random float32 values."""
    from transformers import InternVLForConditionalGeneration

    config = base_config()
    config.text_config.vocab_size = VOCABULARY
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = InternVLForConditionalGeneration(config)
    return make_prm(model, build_tokenizer(), build_image_processor())


@torch.no_grad()
def original_loop(prm: PRM, examples: Sequence[StepExample], collator: Collator) -> list[Tensor]:
    """Return step scores as in DreamPRM-1.5's ``select_best_answer``, in the model's dtype."""
    scores = []
    for example in examples:
        encoded = collator.encode(example)
        batch = collator([encoded])
        logits = prm.model(**{name: batch[name] for name in _INPUTS if name in batch}).logits
        probs = torch.softmax(logits, dim=-1)  # [1, seq, vocabulary]
        scores.append(probs[0, encoded.label_positions, prm.plus_id])
    return scores


def ours(
    prm: PRM,
    examples: Sequence[StepExample],
    collator: Collator,
    batch_size: int,
    *,
    full_vocab: bool = False,
    trees: bool = False,
) -> list[Tensor]:
    """Return step scores by ``score_examples``, after encoding the examples."""
    encoded = [collator.encode(example) for example in examples]
    batches = collator if trees else lambda rows: collator(rows)
    return score_examples(prm, {}, encoded, batches, batch_size, full_vocab=full_vocab)


def compare(
    prm: PRM,
    examples: Sequence[StepExample],
    batch_size: int,
    rounds: int,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure every way of scoring; rates and ratios are medians over rounds."""

    def fresh() -> Collator:  # Its cache holds no tiles of an earlier way.
        return prm.collator(system_prompt=SYSTEM_PROMPT)

    ways: dict[str, Callable[[], list[Tensor]]] = {
        _ORIGINAL: lambda: original_loop(prm, examples, fresh()),
        "one at a time, vocabulary at labels": lambda: ours(
            prm, examples, fresh(), 1, full_vocab=True
        ),
        f"batches of {batch_size}, vocabulary at labels": lambda: ours(
            prm, examples, fresh(), batch_size, full_vocab=True
        ),
        f"batches of {batch_size}, two labels": lambda: ours(prm, examples, fresh(), batch_size),
        f"batches of {batch_size}, trees, two labels": lambda: ours(
            prm, examples, fresh(), batch_size, trees=True
        ),
    }
    results = {name: with_peak(way) for name, way in ways.items()}
    seconds = in_rounds({name: Timed(way) for name, way in ways.items()}, rounds, report)
    reference = torch.cat(results[_ORIGINAL][0])
    rows = []
    for name, (scores, peak) in results.items():
        same = not name.endswith("two labels")
        rows.append(
            {
                "name": name,
                "solutions_per_second": len(examples)
                / median_of(seconds, lambda one, name=name: one[name]),  # type: ignore[misc]
                "speedup": median_of(
                    seconds,
                    lambda one, name=name: one[_ORIGINAL] / one[name],  # type: ignore[misc]
                ),
                "peak_bytes": peak,
                "peak_ratio": peak / results[_ORIGINAL][1],
                "largest_difference": float((torch.cat(scores) - reference).abs().max())
                if same
                else None,
            }
        )
    lengths = [len(fresh().encode(example).input_ids) for example in examples]
    return {
        "rows": rows,
        "solutions": len(examples),
        "steps": len(reference),
        "tokens": {"mean": sum(lengths) / len(lengths), "max": max(lengths)},
        "vocabulary": VOCABULARY,
        "parameters": sum(tensor.numel() for tensor in prm.model.parameters()),
        "rounds": rounds,
        "machine": machine(),
        "environment": environment(),
    }


def table(comparison: Mapping[str, Any]) -> str:
    """Return the comparison as text, with one line per way."""
    tokens = comparison["tokens"]
    lines = [
        f"{comparison['solutions']} solutions of {tokens['mean']:.0f} tokens on average, "
        f"vocabulary {comparison['vocabulary']}, float32",
        f"{'':<38}{'solutions/s':>12}{'x':>8}{'peak MB':>10}{'x':>8}{'difference':>12}",
    ]
    for row in comparison["rows"]:
        difference = row["largest_difference"]
        lines.append(
            f"{row['name']:<38}{row['solutions_per_second']:>12.1f}{row['speedup']:>8.1f}"
            f"{row['peak_bytes'] / 1e6:>10.0f}{row['peak_ratio']:>8.3f}"
            + (f"{difference:>12.0e}" if difference is not None else f"{'':>12}")
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.bench_scoring", description=__doc__
    )
    parser.add_argument("--questions", type=int, default=8, help="of 8 candidates each")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--output", default="results/bench_scoring.json", help="JSON file")
    given = parser.parse_args(arguments)
    check_writable("--output", Path(given.output))
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        build(
            data,
            seed=0,
            sizes=Sizes(
                train_questions=9,
                train_solutions=1,
                cold_questions=1,
                meta_questions=3,
                meta_solutions=2,
                dev_questions=1,
                test_questions=given.questions,
                candidates=8,
            ),
        )
        examples = read_jsonl(data / "test.jsonl")
        comparison = compare(wide_vocabulary_model(), examples, given.batch_size, given.rounds)
    print(table(comparison))
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m recipes.evidence.bench_scoring", *words])
    write_json(Path(given.output), comparison | {"command": command})


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.bench_scoring", main))
