"""``data inspect``: one example as the model gets it, and the positions of its judgements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prm.data.image_files import ImageFiles
from prm.data.reader import Row, image_errors, iter_rows
from prm.data.stepwise_writer import read_weights
from prm.data_urls import shown
from prm.inputs.collate import EncodedExample
from prm.inputs.tiles import image_size
from prm.schema import DataError, StepExample
from recipes.data_files.options import InspectOptions
from recipes.models.loading import load_model, set_up
from recipes.options.values import OptionError, existing_file
from recipes.run.files import note_unchecked
from recipes.terminal import printable

_SHOWN = 100


def inspect(options: InspectOptions) -> str:
    """Return the report on one example: record, images with tiles, steps with labels and positions.

    Raises:
        OptionError: The file, row or candidate does not exist.
        DataError: The record cannot be used, or has no weight in ``--weights``.
    """
    path = existing_file(options.file)
    row, example = _find(path, options)
    set_up(options)
    prm, _ = load_model(options)
    collator = prm.collator()
    encoded = collator.encode(example)
    lines = [f"{printable(path)}:{row.line} ({row.format})", *_fields(example, options, encoded)]
    lines += _steps(encoded, collator.prompt.tokenizer)
    if options.tokens:
        lines += ["", *_tokens(encoded, collator.prompt.tokenizer)]
    return "\n".join(lines)


def _find(path: Path, options: InspectOptions) -> tuple[Row, StepExample]:
    root = path.parent if options.image_root is None else Path(options.image_root)
    rows = 0
    for row in iter_rows(path, root, format=options.format):
        rows += 1
        if row.line != options.row:
            continue
        if isinstance(row, DataError):
            raise row
        if not 0 <= options.candidate < len(row.examples):
            raise OptionError(
                f"--candidate {options.candidate}: row {row.line} has {len(row.examples)}, "
                "counted from 0"
            )
        example = row.examples[options.candidate]
        images = ImageFiles(root, allow_outside=options.allow_outside_images, check="decode")
        for error in image_errors(row, example, images, path):
            raise error
        return row, example
    raise OptionError(f"--row {options.row}: {path} has {rows:,} rows, counted from 1")


def _fields(example: StepExample, options: InspectOptions, encoded: EncodedExample) -> list[str]:
    lines = [f"id        {printable(example.id)}"]
    for name in ("group", "domain", "answer", "correct"):
        value = getattr(example, name)
        if value is not None:
            lines.append(f"{name:<10}{printable(value)}")
    if options.weights is not None:
        weights = read_weights(existing_file(options.weights))
        if example.id not in weights:
            raise DataError(
                file=options.weights,
                field="id",
                expected=f"a weight of {example.id!r}",
                found=f"{len(weights):,} other ids",
                remedy="use the weights.jsonl of a run on the same file",
            )
        note_unchecked(Path(options.weights))
        lines.append(f"weight    {weights[example.id]:.6g}")
    lines.append(f"question  {_short(example.question)}")
    for image, tiles in zip(example.images, encoded.tile_counts, strict=True):
        height, width = image_size(image)
        name = printable(shown(image))
        lines.append(f"image     {name}  {width} x {height} pixels, {tiles} tiles")
    lines.append(
        f"tokens    {len(encoded.input_ids)}, scored at {len(encoded.label_positions)} of them"
    )
    return lines


def _steps(encoded: EncodedExample, tokenizer: Any) -> list[str]:
    lines = ["", "step  label  position  behind token   text"]
    positions = encoded.label_positions.tolist()
    for number, (step, position) in enumerate(zip(encoded.example.steps, positions, strict=True)):
        label = {None: "none", 1.0: "+", 0.0: "-"}.get(step.label, f"{step.label}")
        token = repr(tokenizer.decode([int(encoded.input_ids[position])]))
        lines.append(f"{number:>4}  {label:>5}  {position:>8}  {token:<13}  {_short(step.text)}")
    return lines


def _tokens(encoded: EncodedExample, tokenizer: Any) -> list[str]:
    """Return lines with position, id and text of every token; a repeated token has one line."""
    ids = encoded.input_ids.tolist()
    scored = {position: number for number, position in enumerate(encoded.label_positions.tolist())}
    lines, position = ["position  token"], 0
    while position < len(ids):
        end = position + 1
        while end < len(ids) and ids[end] == ids[position] and position not in scored:
            if end in scored:
                break
            end += 1
        times = f" x {end - position}" if end > position + 1 else ""
        mark = f"  <- judgement of step {scored[position]}" if position in scored else ""
        lines.append(
            f"{position:>8}  {ids[position]:>6} {tokenizer.decode([ids[position]])!r}{times}{mark}"
        )
        position = end
    return lines


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."
