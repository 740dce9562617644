"""Process reward models: step-labelled examples in, step scores and selections out.

Names are imported when they are first used, so ``import prm`` loads neither torch nor transformers.
"""

from __future__ import annotations

import ast
import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

# The one list of public names. Type checkers follow these imports (``as`` marks a re-export); at
# run time nothing of them is executed: ``_homes`` reads from them where each name is defined.
if TYPE_CHECKING:
    from prm.conventions import Conventions as Conventions
    from prm.conventions import read_conventions as read_conventions
    from prm.conventions import write_conventions as write_conventions
    from prm.data.reader import checked_rows as checked_rows
    from prm.data.reader import iter_rows as iter_rows
    from prm.data.reader import read_examples as read_examples
    from prm.data.reader import read_jsonl as read_jsonl
    from prm.data.reader import write_jsonl as write_jsonl
    from prm.data.splitter import solution_steps as solution_steps
    from prm.data.splitter import split_steps as split_steps
    from prm.data.stepwise_writer import read_weights as read_weights
    from prm.data.stepwise_writer import write_stepwise as write_stepwise
    from prm.data.store.encoded import EncodedExamples as EncodedExamples
    from prm.data.store.examples import StoredExamples as StoredExamples
    from prm.data.store.examples import store_examples as store_examples
    from prm.evaluation.answers import answer_classes as answer_classes
    from prm.evaluation.answers import canonical_answer as canonical_answer
    from prm.evaluation.calibration import brier as brier
    from prm.evaluation.calibration import expected_calibration_error as expected_calibration_error
    from prm.evaluation.calibration import reliability as reliability
    from prm.evaluation.final_answer import final_answer as final_answer
    from prm.evaluation.metrics import best_of_k_curve as best_of_k_curve
    from prm.evaluation.metrics import bootstrap_interval as bootstrap_interval
    from prm.evaluation.metrics import expected_best_of_k as expected_best_of_k
    from prm.evaluation.metrics import f1 as f1
    from prm.evaluation.metrics import macro_f1 as macro_f1
    from prm.evaluation.metrics import mcnemar as mcnemar
    from prm.evaluation.metrics import paired_interval as paired_interval
    from prm.evaluation.metrics import pass_at_k as pass_at_k
    from prm.evaluation.metrics import roc_auc as roc_auc
    from prm.evaluation.metrics import roc_auc_interval as roc_auc_interval
    from prm.evaluation.second_opinion import load_math_verify as load_math_verify
    from prm.evaluation.select import best_candidate as best_candidate
    from prm.evaluation.select import best_of_n as best_of_n
    from prm.evaluation.select import self_consistency as self_consistency
    from prm.evaluation.select import weighted_vote as weighted_vote
    from prm.evaluation.step_benchmarks import best_threshold as best_threshold
    from prm.evaluation.step_benchmarks import first_error as first_error
    from prm.evaluation.step_benchmarks import process_bench as process_bench
    from prm.evaluation.step_benchmarks import visual_process_bench as visual_process_bench
    from prm.inputs.collate import Batch as Batch
    from prm.inputs.collate import Collator as Collator
    from prm.inputs.collate import EncodedExample as EncodedExample
    from prm.inputs.prompt import SYSTEM_PROMPT as SYSTEM_PROMPT
    from prm.inputs.prompt import PromptEncoder as PromptEncoder
    from prm.losses import outcome_loss as outcome_loss
    from prm.losses import step_cross_entropy as step_cross_entropy
    from prm.models.model import PRM as PRM
    from prm.models.model import load_prm as load_prm
    from prm.models.model import make_prm as make_prm
    from prm.models.model import save_prm as save_prm
    from prm.models.model import split_parameters as split_parameters
    from prm.models.model import step_logits as step_logits
    from prm.names import Context as Context
    from prm.names import LossTarget as LossTarget
    from prm.names import TieRule as TieRule
    from prm.rewards.scorer import Judgement as Judgement
    from prm.rewards.scorer import Scorer as Scorer
    from prm.schema import DataError as DataError
    from prm.schema import Step as Step
    from prm.schema import StepExample as StepExample
    from prm.scoring import StepScores as StepScores
    from prm.scoring import aggregate as aggregate
    from prm.scoring import score_examples as score_examples
    from prm.scoring import solution_scores as solution_scores
    from prm.scoring import step_probs as step_probs
    from prm.scoring import step_scores as step_scores


def _homes() -> dict[str, str]:
    """The module of every public name, read from the imports above."""
    source = pkgutil.get_data(__name__, "__init__.py") or b""
    (block,) = (node for node in ast.parse(source).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_HOMES = _homes()

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
