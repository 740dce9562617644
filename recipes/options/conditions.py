"""Conditions under which a run reads an option, in the order in which refusals are reported.

A condition is a function of all options of a command by flat name.
"""

from __future__ import annotations

from typing import Any

from recipes.options.base import Condition, flag_of


def is_weighted(given: Any) -> bool:
    """Return whether weights are learned."""
    return bool(given.weighting != "none")


def has_meta_loss(given: Any) -> bool:
    """Return whether the loss on the meta set is computed."""
    return is_weighted(given) or given.lower_data == "meta"


def is_evaluated(given: Any) -> bool:
    """Return whether candidates are scored at the end."""
    return given.dev_file is not None or given.test_file is not None


def _reads_the_model(given: Any) -> bool:
    from weighting import is_model_feature  # imported here: it imports torch, which --help need not

    return any(is_model_feature(name) for name in given.features)


def _scores_initially(given: Any) -> bool:
    """Return whether the training set is scored under the initial model."""
    if getattr(given, "weighting", "none") == "none":
        return False
    return bool(given.initial_loss or (given.weighting == "net" and given.reference_features))


def _one_of(name: str, *values: str, shown: str | None = None) -> Condition:
    """Return the condition that an option has one of some values."""
    listed = " or ".join(part for part in (", ".join(values[:-1]), values[-1]) if part)
    return Condition(
        lambda given: getattr(given, name) in values,
        (name,),
        f"use {flag_of(name)} {listed}",
        shown=shown,
    )


WEIGHTED = Condition(is_weighted, ("weighting",), "use --weighting net, table, domain or labels")
META_LOSS = Condition(
    has_meta_loss, ("weighting", "lower_data"), "use a weighting or --lower-data meta"
)
BOUND_LOW = _one_of("bound", "clip", "clamp", shown="clip, clamp")
BOUND_HIGH = _one_of("bound", "clip", "clamp", "sigmoid", shown="clip, clamp, sigmoid")
UPPER_COSINE = _one_of("upper_schedule", "cosine", shown="cosine")
UPPER_STEP = _one_of("upper_schedule", "step", shown="step")
PRIOR = _one_of("weighting", "net", "table", shown="net, table")
NORMALISED = Condition(
    lambda given: given.weighting in ("net", "table") or given.weights_file is not None,
    ("weighting", "weights_file"),
    "use --weighting net or table, or --weights-file",
    shown="net, table, weights file",
)
BOUNDED = _one_of("weighting", "net", "table", "domain", shown="net, table, domain")
NET = _one_of("weighting", "net")
LABELS = _one_of("weighting", "labels")
MODEL_FEATURE = Condition(
    _reads_the_model, ("features",), "use a feature that depends on the model"
)
GRADIENT_FEATURE = Condition(
    lambda given: "gradient" in given.features, ("features",), "name gradient among --features"
)
UPPER_ADAM = _one_of("upper_optimizer", "adam", "lazy-adam")
CENTRAL_DIFFERENCE = _one_of("route", "central-difference")
ONE_STEP = _one_of("hypergradient", "one-step", shown="one-step")
UPPER_FIRST = _one_of("order", "upper-first")
IMPLICIT = _one_of("hypergradient", "implicit", shown="implicit")
PENALTY = _one_of("hypergradient", "penalty", shown="penalty")
UNWEIGHTED = _one_of("weighting", "none", shown="weighting none")
ON_TRAIN_FILE = _one_of("lower_data", "train")
AGGREGATED = Condition(
    lambda given: has_meta_loss(given) or is_evaluated(given),
    ("weighting", "dev_file", "test_file"),
    "give candidates to score",
)
SCORED = Condition(
    lambda given: is_weighted(given) or is_evaluated(given),
    ("weighting", "dev_file", "test_file"),
    "give candidates to score",
)
TUNED_AND_TEST = Condition(
    lambda given: (has_meta_loss(given) or given.keep_best) and given.test_file is not None,
    ("weighting", "meta_file", "keep_best", "test_file"),
    "give --test-file, and --meta-file or --keep-best",
)
DEV_NAMED = Condition(lambda given: given.dev_file is not None, ("dev_file",), "give --dev-file")
TEST_NAMED = Condition(
    lambda given: given.test_file is not None, ("test_file",), "give --test-file"
)
EVALUATED = Condition(
    lambda given: given.eval_every > 0, ("eval_every",), "use --eval-every 1 or more"
)
FROM_MODEL = Condition(
    lambda given: given.init_from is None, ("init_from",), "use --init-from none"
)
LOWER_COSINE = _one_of("lower_schedule", "cosine", shown="cosine")
LOWER_STEP = _one_of("lower_schedule", "step", shown="step")
LORA = Condition(lambda given: given.lora_rank > 0, ("lora_rank",), "use --lora-rank 1 or more")
KEPT = _one_of("frozen_activations", "memory", "disk")
CACHED = Condition(
    lambda given: given.frozen_activations == "disk" or _scores_initially(given),
    ("frozen_activations",),
    "use --frozen-activations disk, or a weighting with --initial-loss",
)
SAVED = Condition(lambda given: given.save_every > 0, ("save_every",), "use --save-every 1 or more")
