"""Names by which a caller chooses aggregations, formats, contexts and rules for ties.

Each is a ``Literal`` type, the one list of its names: functions are annotated with it, and
``typing.get_args`` turns it into a tuple, for a command line or a check. Nothing here imports
torch, so that ``--help`` can list the names at once.
"""

from __future__ import annotations

from typing import Literal, get_args

AggregationName = Literal[
    "mean", "min", "max", "last", "product", "log_mean", "logit_mean", "logit_sum"
]
"""Ways to combine step scores into a solution score; ``prm.aggregations.AGGREGATIONS`` holds the
functions."""

Context = Literal["plus", "gold", "masked"]
"""The content of the assistant slots of earlier steps: always "+" (as when no label is known), the
step's gold label ("-" below 0.5; "+" where there is none), or the tokenizer's padding token, which
carries no information."""

Probability = Literal["labels", "vocabulary"]
"""The softmax that a step score is read from: over the two labels or, as in DreamPRM-1.5, over the
whole vocabulary."""

LossTarget = Literal["both", "+"]
"""The scores that the upper-level loss compares with the outcome; see
``prm.losses.outcome_loss``."""

TieRule = Literal["expected", "first", "last"]
"""The value of a selection where several candidates are best: the average over a fair draw among
them, or the value of the first or of the last."""

DrawRule = Literal["random", "first", "last"]
"""The candidate that is selected among several best ones: one at random, the first, or the last."""

ImageCheck = Literal["exists", "header", "decode", "sample"]
"""How closely an image is checked. "exists": the file is there. "header": its header gives a size,
and it does not look cut off. "decode": every pixel is decoded. "sample": the first thousand images
are decoded, and of the others the header is read (about 0.1 ms each, whereas decoding a photo takes
10)."""

OnBadRow = Literal["refuse", "skip"]
"""What a row that cannot be used leads to: an error, or that it is left out, counted and listed."""

TooLong = Literal["refuse", "truncate"]
"""What a solution that is longer than the model's context leads to: an error, or that as many whole
steps as fit are kept from its start."""

FormatName = Literal[
    "prm-jsonl",
    "visualprm",
    "visualprm-raw",
    "dreamprm-test",
    "dreamprm-train",
    "dreamprm-meta",
    "stepwise",
    "messages",
    "processbench",
    "visualprocessbench",
    "mathcheck",
    "mathcheck-candidates",
    "game24",
    "math-shepherd",
    "openrlhf",
    "openr",
    "mm-prm",
    "rlhflow",
    "rlhflow-candidates",
    "math-aps",
    "prm800k",
    "prmbench",
    "mr-ben",
    "big-bench-mistake",
    "mathcheck-checklist",
    "math-vision",
]
"""Data formats; ``prm.data.formats.table.FORMATS`` holds their readers."""

FormatChoice = Literal["auto", FormatName]
"""A data format, or "auto": the format that the first record of a file looks like."""

FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)

Precision = Literal["float32", "bf16", "bf16-pure"]
"""Of the parameters and of the body of a model (``prm.placement.Placement``)."""

Attention = Literal["auto", "eager", "sdpa", "flash"]
"""Kernel of the attention."""

Recomputed = Literal["none", "vision", "all"]
"""Layers that are recomputed in the backward pass instead of being stored."""
