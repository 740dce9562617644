# ruff: noqa: F401 - the imports below are the public names
"""Process reward models: step-labelled examples in, step scores and selections out.

Names are imported when first used, so ``import prm`` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for type checkers
    from prm.data.reader import checked_rows, iter_rows, read_examples, read_jsonl, write_jsonl
    from prm.data.splitter import final_answer, solution_steps, split_steps
    from prm.data.stepwise_writer import read_weights, write_stepwise
    from prm.evaluation.answers import answer_classes, canonical_answer
    from prm.evaluation.calibration import brier, expected_calibration_error, reliability
    from prm.evaluation.metrics import (
        best_of_k_curve,
        bootstrap_interval,
        expected_best_of_k,
        f1,
        macro_f1,
        mcnemar,
        paired_interval,
        pass_at_k,
        roc_auc,
    )
    from prm.evaluation.select import (
        best_candidate,
        best_of_n,
        self_consistency,
        weighted_vote,
    )
    from prm.evaluation.step_benchmarks import (
        best_threshold,
        first_error,
        process_bench,
        visual_process_bench,
    )
    from prm.inputs.collate import Batch, Collator, EncodedExample
    from prm.inputs.prompt import SYSTEM_PROMPT, PromptEncoder
    from prm.losses import outcome_loss, step_cross_entropy
    from prm.models.model import (
        PRM,
        load_prm,
        make_prm,
        save_prm,
        split_parameters,
        step_logits,
    )
    from prm.names import Context, LossTarget, TieRule
    from prm.schema import DataError, Step, StepExample
    from prm.scoring import aggregate, score_examples, solution_scores, step_probs, step_scores

_PUBLIC = {
    "evaluation.answers": ("answer_classes", "canonical_answer"),
    "evaluation.calibration": ("brier", "expected_calibration_error", "reliability"),
    "inputs.collate": ("Batch", "Collator", "EncodedExample"),
    "losses": ("outcome_loss", "step_cross_entropy"),
    "evaluation.metrics": (
        "best_of_k_curve",
        "bootstrap_interval",
        "expected_best_of_k",
        "f1",
        "macro_f1",
        "mcnemar",
        "paired_interval",
        "pass_at_k",
        "roc_auc",
    ),
    "models.model": ("PRM", "load_prm", "make_prm", "save_prm", "split_parameters", "step_logits"),
    "inputs.prompt": ("SYSTEM_PROMPT", "PromptEncoder"),
    "data.reader": ("checked_rows", "iter_rows", "read_examples", "read_jsonl", "write_jsonl"),
    "names": ("Context", "LossTarget", "TieRule"),
    "schema": ("DataError", "Step", "StepExample"),
    "scoring": ("aggregate", "score_examples", "solution_scores", "step_probs", "step_scores"),
    "evaluation.select": (
        "best_candidate",
        "best_of_n",
        "self_consistency",
        "weighted_vote",
    ),
    "data.splitter": ("final_answer", "solution_steps", "split_steps"),
    "evaluation.step_benchmarks": (
        "best_threshold",
        "first_error",
        "process_bench",
        "visual_process_bench",
    ),
    "data.stepwise_writer": ("read_weights", "write_stepwise"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prm' has no attribute {name!r}")
    return getattr(import_module(f"prm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
