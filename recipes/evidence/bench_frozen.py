"""What a training step costs with and without kept activations of frozen parts.

Run by ``python -m recipes.evidence.bench_frozen``.

Two models of random weights, of whose steps the cost does not depend on the values: a decoder of
SmolLM2-135M's shape, of which the top layers are trained; and InternVL3-1B's architecture at a
quarter of its width, whose vision tower and projector are frozen. Each takes plain steps (a forward
and a backward pass, AdamW) over epochs of a few examples, without ``--frozen-activations`` and with
it: in the first epoch, which computes the front of each example alone, and in later ones. Reported
are processor seconds per step, medians over steps, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bilevel import SGD, AdamW, BilevelSolver, OneStep
from prm.activations.batches import FrozenFront
from prm.activations.stores import MemoryStore
from prm.aggregations import AGGREGATIONS
from prm.inputs.collate import Batch
from prm.models.boundary import find_boundary
from prm.models.model import PRM, split_parameters
from recipes.evidence.bench.race.model import SHAPES, make_race
from recipes.method.objective import Objective
from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json
from recipes.run.provenance import environment, machine

LAYERS = 30
_VOCABULARY = 49_152
_TOKENS = (140, 200)
_STEPS = 4  # label positions


def decoder(layers: int = LAYERS) -> PRM:
    """Return a model of SmolLM2-135M's shape, or with fewer layers, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return PRM(model.eval().requires_grad_(False), None, None, None, 10, 12)


def text_batch(size: int, seed: int) -> Batch:
    """Return examples of different lengths, padded."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(_TOKENS[0], _TOKENS[1] + 1, (size,), generator=draw)
    seq = int(lengths.max())
    places = torch.linspace(0.5, 1.0, _STEPS)[None] * (lengths[:, None] - 1)
    return {
        "input_ids": torch.randint(_VOCABULARY, (size, seq), generator=draw),
        "attention_mask": (torch.arange(seq) < lengths[:, None]).long(),
        "num_patches": torch.zeros(size, dtype=torch.int64),
        "label_positions": places.long(),
        "step_mask": torch.ones(size, _STEPS, dtype=torch.bool),
        "labels": torch.randint(2, (size, _STEPS), generator=draw).float(),
    }


def seconds_per_step(
    prm: PRM, freeze: Sequence[str], batches: Sequence[Batch], epochs: int, *, kept: bool
) -> tuple[list[list[float]], int]:
    """Return the processor seconds of every step of every epoch, and the bytes that are kept."""
    trained, _ = split_parameters(prm.model, freeze)
    prm = replace(prm, boundary=find_boundary(prm.model, trained))
    store = MemoryStore(10**11)
    front: Callable[[Batch], Batch] = FrozenFront(prm, store) if kept else lambda batch: batch
    objective = Objective(prm, AGGREGATIONS["mean"], "both", None)
    order = OneStep(order="upper-first")
    solver = BilevelSolver(objective.problem(), AdamW(1e-4), SGD(0.0), order)
    state = solver.init({name: leaf.clone() for name, leaf in trained.items()}, {})
    seconds: list[list[float]] = []
    for _ in range(epochs):
        epoch = []
        for batch in batches:
            started = time.process_time()
            state, _ = solver.step(state, [front(batch)])
            epoch.append(time.process_time() - started)
        seconds.append(epoch)
    return seconds, store.bytes


def compared(
    name: str, prm: PRM, freeze: Sequence[str], batches: Sequence[Batch], epochs: int
) -> dict[str, Any]:
    """Return a row of the table: the same steps without and with kept activations."""
    plain, _ = seconds_per_step(prm, freeze, batches, epochs, kept=False)
    kept, size = seconds_per_step(prm, freeze, batches, epochs, kept=True)
    without, first, later = (
        statistics.median(one for epoch in part for one in epoch)
        for part in (plain[1:], kept[:1], kept[1:])
    )
    examples = sum(len(batch["labels"]) for batch in batches)
    return {
        "model": name,
        "batch_size": len(batches[0]["labels"]),
        "examples": examples,
        "tokens": sum(batch["input_ids"].numel() for batch in batches) / examples,
        "without": round(without, 2),
        "first_epoch": round(first, 2),
        "later": round(later, 2),
        "times_faster": round(without / later, 2),
        "kept_bytes_per_example": size // examples,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print and store the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.bench_frozen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the decoder")
    parser.add_argument("--trained", type=int, default=7, help="how many top layers are trained")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2, help="in an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="quarter", help="of InternVL; see race")
    parser.add_argument("--output", default="results/bench_frozen.json")
    given = parser.parse_args(arguments)
    check_writable("--output", Path(given.output))
    torch.set_num_threads(1)
    front = given.layers - given.trained
    frozen = ("embed_tokens", *(f"layers.{number}" for number in range(front)))
    texts = [text_batch(given.batch_size, seed) for seed in range(given.batches)]
    name = f"SmolLM2-135M's shape, {given.trained} of {given.layers} layers trained"
    rows = [compared(name, decoder(given.layers), frozen, texts, given.epochs)]
    race = make_race(SHAPES[given.shape], torch.float32)
    seen = [race.batch(given.batch_size, seed) for seed in range(given.batches)]
    tower = ("vision_tower", "multi_modal_projector")
    name = f"InternVL, {race.shape.name}, vision tower and projector frozen"
    rows.append(compared(name, race.objective.prm, tower, seen, given.epochs))
    print(table(rows))
    words = sys.argv[1:] if arguments is None else arguments
    named = " ".join(["python -m recipes.evidence.bench_frozen", *words])
    results = {"rows": rows, "machine": machine(), "environment": environment()}
    write_json(Path(given.output), results | {"command": named})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| model | examples | without | first epoch | later epochs | × faster | MB kept each |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['batch_size']} | {row['without']} | {row['first_epoch']} | "
        f"{row['later']} | {row['times_faster']} | {row['kept_bytes_per_example'] / 1e6:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.bench_frozen", main))
