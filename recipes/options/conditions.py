"""Conditions under which a run reads an option, in the order in which refusals are reported.

A condition is a function of all options of a command by flat name.
"""

from __future__ import annotations

from typing import Any

from recipes.options.base import Condition


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


WEIGHTED = Condition(is_weighted, ("weighting",), "use --weighting net, table or domain")
META_LOSS = Condition(
    has_meta_loss, ("weighting", "lower_data"), "use a weighting or --lower-data meta"
)
BOUND_LOW = Condition(
    lambda given: given.bound in ("clip", "clamp"),
    ("bound",),
    "use --bound clip or clamp",
    shown="clip, clamp",
)
BOUND_HIGH = Condition(
    lambda given: given.bound in ("clip", "clamp", "sigmoid"),
    ("bound",),
    "use --bound clip, clamp or sigmoid",
    shown="clip, clamp, sigmoid",
)
UPPER_COSINE = Condition(
    lambda given: given.upper_schedule == "cosine",
    ("upper_schedule",),
    "use --upper-schedule cosine",
    shown="cosine",
)
UPPER_STEP = Condition(
    lambda given: given.upper_schedule == "step",
    ("upper_schedule",),
    "use --upper-schedule step",
    shown="step",
)
PRIOR = Condition(
    lambda given: given.weighting in ("net", "table"),
    ("weighting",),
    "use --weighting net or table",
    shown="net, table",
)
NORMALISED = Condition(
    lambda given: given.weighting in ("net", "table") or given.weights_file is not None,
    ("weighting", "weights_file"),
    "use --weighting net or table, or --weights-file",
    shown="net, table, weights file",
)
NET = Condition(lambda given: given.weighting == "net", ("weighting",), "use --weighting net")
MODEL_FEATURE = Condition(
    _reads_the_model, ("features",), "use a feature that depends on the model"
)
UPPER_ADAM = Condition(
    lambda given: given.upper_optimizer != "sgd",
    ("upper_optimizer",),
    "use --upper-optimizer adam or lazy-adam",
)
CENTRAL_DIFFERENCE = Condition(
    lambda given: given.route == "central-difference",
    ("route",),
    "use --route central-difference",
)
ONE_STEP = Condition(
    lambda given: given.hypergradient == "one-step",
    ("hypergradient",),
    "use --hypergradient one-step",
    shown="one-step",
)
IMPLICIT = Condition(
    lambda given: given.hypergradient == "implicit",
    ("hypergradient",),
    "use --hypergradient implicit",
    shown="implicit",
)
PENALTY = Condition(
    lambda given: given.hypergradient == "penalty",
    ("hypergradient",),
    "use --hypergradient penalty",
    shown="penalty",
)
UNWEIGHTED = Condition(
    lambda given: given.weighting == "none",
    ("weighting",),
    "use --weighting none",
    shown="weighting none",
)
ON_TRAIN_FILE = Condition(
    lambda given: given.lower_data == "train", ("lower_data",), "use --lower-data train"
)
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
META_AND_TEST = Condition(
    lambda given: has_meta_loss(given) and given.test_file is not None,
    ("weighting", "meta_file", "test_file"),
    "give --meta-file and --test-file",
)
FROM_MODEL = Condition(
    lambda given: given.init_from is None, ("init_from",), "use --init-from none"
)
LOWER_COSINE = Condition(
    lambda given: given.lower_schedule == "cosine",
    ("lower_schedule",),
    "use --lower-schedule cosine",
    shown="cosine",
)
LOWER_STEP = Condition(
    lambda given: given.lower_schedule == "step",
    ("lower_schedule",),
    "use --lower-schedule step",
    shown="step",
)
SAVED = Condition(lambda given: given.save_every > 0, ("save_every",), "use --save-every 1 or more")
