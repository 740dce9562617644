"""Bilevel optimization with exact, cheap hypergradients.

A problem is a pair of pure functions of (lower parameters, upper parameters, batch), an algorithm
a frozen dataclass of its hyperparameters, a state a pytree of tensors. Start with
``BilevelProblem`` or ``ReweightingProblem``, and ``BilevelSolver``; audit with
``check_hypergradient``.

What is claimed of each hypergradient, and held to it by tests:

============  ==========================================  ==================================
class         is the derivative of                        exact for
============  ==========================================  ==================================
OneStep       the upper loss after the last lower step    every optimizer here, every route
                                                          but CentralDifference, in order
                                                          lower-first
Unrolled      the upper loss after the last T steps       every optimizer here
Implicit      the upper loss at the lower level solved    a stationary θ, no weight decay in
                                                          the optimizer, no damping
Penalty       a penalised problem                         no λ: its error falls as 1/λ
============  ==========================================  ==================================

A constant of autograd is one for all of them: features of a ``ReweightingProblem`` (unless
``detach_features=False``), and whatever a loss computes by ``.detach()``, ``.item()`` or under
``torch.no_grad``. So the derivative through several steps, or at a solution, is that of the
function in which constants stay as they were, the stop-gradient of the literature; where they
depend on φ by way of θ, ``check_hypergradient`` says how far that is from the derivative of
everything. ``OneStep`` has no such difference in its lower loss: θ is given.

Limits: ``Unrolled`` (T = 1) is ``OneStep``; at a stationary θ, T steps of ``SGD`` (η) are
``Implicit`` with ``Neumann(T − 1, η)``, and T → ∞ is ``Implicit`` solved; ``CentralDifference`` is
of second order in its step. Layers: linear, attention, RMSNorm, LayerNorm, GroupNorm, convolutions,
embeddings, tied and frozen parameters, dropout (the same in all passes). Precision, on the models
of the tests: float64 to rounding, float32 within 1e-4, bfloat16 within 2.5 % through one step and
10 % through several or implicitly, with moments in float32.
"""

from __future__ import annotations

from bilevel.audit.check import HypergradientCheck, check_hypergradient
from bilevel.audit.comparison import Agreement, HypergradientComparison, compare_hypergradients
from bilevel.audit.diagnostics import Movement, Stationarity, movement, stationarity
from bilevel.collective import Alone, Collective, RankError
from bilevel.fit import Callback, FitStep, early_stop, fit, load_checkpoint
from bilevel.fit import checkpoint as checkpoint
from bilevel.fit import log as log
from bilevel.fit import losses as losses
from bilevel.fit import progress as progress
from bilevel.functional import Functional, functional
from bilevel.hypergradients.base import (
    Hypergradient,
    HypergradientResult,
    Record,
    take_window,
)
from bilevel.hypergradients.implicit import Implicit, ImplicitMemory, StationarityWarning
from bilevel.hypergradients.linear.dense import Dense
from bilevel.hypergradients.linear.iterative import ConjugateGradient, Neumann
from bilevel.hypergradients.linear.nystrom import Nystrom
from bilevel.hypergradients.linear.system import LinearSolution, LinearSolver
from bilevel.hypergradients.one_step import OneStep, OneStepRecord
from bilevel.hypergradients.penalty import Penalty, PenaltyMemory
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.hypergradients.update_derivative import Exact, Identity, Sama, UpdateDerivative
from bilevel.lower.ghost.tracker import Refusal
from bilevel.lower.steps import LowerSteps, PassRequest, Point, Step, Window
from bilevel.optimizers.base import (
    DifferentiableOptimizer,
    Hyperparameters,
    Optimizer,
    OptimizerState,
    UpdateCotangents,
)
from bilevel.optimizers.lazy import LazyRowAdam, LazyRowState
from bilevel.optimizers.optimizers import SGD, Adagrad, Adam, AdamW, RMSProp
from bilevel.optimizers.projected import Projected
from bilevel.optimizers.schedule import Constant, Schedule, StepDecay, WarmupCosine
from bilevel.optimizers.variants import AdaDelta, Adamax, NAdam, RAdam
from bilevel.problem import BilevelProblem, ReweightingProblem
from bilevel.replicas import Replicas
from bilevel.resident.solver import ResidentSolver
from bilevel.routes import Auto, CentralDifference, Dot, Ghost, Jvp, PerExample, Reverse, Route
from bilevel.shards.checkpoint import Saving, load_shards, save_shards, saving_shards
from bilevel.shards.collective import Shards
from bilevel.shards.module import ShardedModule, sharded
from bilevel.solver import BilevelSolver, NextSteps
from bilevel.state import BilevelState, StepInfo

# Without checkpoint, log, losses and progress: names that others have, too (torch.utils.checkpoint,
# math), and that ``from bilevel import *`` must not replace.
__all__ = [
    "SGD",
    "AdaDelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Agreement",
    "Alone",
    "Auto",
    "BilevelProblem",
    "BilevelSolver",
    "BilevelState",
    "Callback",
    "CentralDifference",
    "Collective",
    "ConjugateGradient",
    "Constant",
    "Dense",
    "DifferentiableOptimizer",
    "Dot",
    "Exact",
    "FitStep",
    "Functional",
    "Ghost",
    "Hypergradient",
    "HypergradientCheck",
    "HypergradientComparison",
    "HypergradientResult",
    "Hyperparameters",
    "Identity",
    "Implicit",
    "ImplicitMemory",
    "Jvp",
    "LazyRowAdam",
    "LazyRowState",
    "LinearSolution",
    "LinearSolver",
    "LowerSteps",
    "Movement",
    "NAdam",
    "Neumann",
    "NextSteps",
    "Nystrom",
    "OneStep",
    "OneStepRecord",
    "Optimizer",
    "OptimizerState",
    "PassRequest",
    "Penalty",
    "PenaltyMemory",
    "PerExample",
    "Point",
    "Projected",
    "RAdam",
    "RMSProp",
    "RankError",
    "Record",
    "Refusal",
    "Replicas",
    "ResidentSolver",
    "Reverse",
    "ReweightingProblem",
    "Route",
    "Sama",
    "Saving",
    "Schedule",
    "ShardedModule",
    "Shards",
    "Stationarity",
    "StationarityWarning",
    "Step",
    "StepDecay",
    "StepInfo",
    "Unrolled",
    "UpdateCotangents",
    "UpdateDerivative",
    "WarmupCosine",
    "Window",
    "check_hypergradient",
    "compare_hypergradients",
    "early_stop",
    "fit",
    "functional",
    "load_checkpoint",
    "load_shards",
    "movement",
    "save_shards",
    "saving_shards",
    "sharded",
    "stationarity",
    "take_window",
]
