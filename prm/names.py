"""Names by which a caller chooses: aggregations, formats, contexts, rules for ties.

Each is a ``Literal`` type, the one list of its names: functions are annotated with it, and
``typing.get_args`` turns it into a tuple, for a command line or a check. Nothing here imports
torch, so that ``--help`` can list the names at once.
"""

from __future__ import annotations

from typing import Literal, get_args

AggregationName = Literal[
    "mean", "min", "max", "last", "product", "log_mean", "logit_mean", "logit_sum"
]
"""How step scores become a solution score; ``prm.aggregations.AGGREGATIONS`` holds the
functions."""

Context = Literal["plus", "gold", "masked"]
"""What stands in the assistant slots of earlier steps: "+" always (as when nothing is known),
the step's gold label ("-" below 0.5; "+" where there is none), or the tokenizer's padding token,
which says nothing."""

LossTarget = Literal["both", "+"]
"""Which scores the upper-level loss compares with the outcome; see ``prm.losses.outcome_loss``."""

TieRule = Literal["expected", "first", "last"]
"""What a selection is worth where several candidates are best: the average over a fair draw among
them, the first, the last."""

DrawRule = Literal["random", "first", "last"]
"""Which of several best candidates is taken: one at random, the first, the last."""

ImageCheck = Literal["exists", "header", "decode", "sample"]
"""How closely an image is looked at: the file is there; its header tells a size and it does not
look cut off; every pixel is decoded; the pixels of the first thousand images, the headers of the
others (about 0.1 ms each, where decoding a photo takes 10)."""

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
]
"""Data formats; ``prm.data.formats.table.FORMATS`` holds their readers."""

FormatChoice = Literal["auto", FormatName]
"""A data format, or "auto": the format that the first record of a file looks like."""

FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)
